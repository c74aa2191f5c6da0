"""Types of options that configs name. They lie apart from the modules that use them, so that a config is read fast."""

from typing import Literal

Preparation = Literal["exact", "compiled", "bfloat16", "none"]
"""Preparation of a model for many passes. `exact` keeps scores within 1e-5. `compiled` adds torch.compile, within the
same tolerance. `bfloat16` adds autocast to `exact` and is less accurate. `none` uses the model as it is."""
