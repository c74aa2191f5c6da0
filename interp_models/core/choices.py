"""Choices of options that configs name: apart from the modules that act on them, so that a config is read at once."""

from typing import Literal

Preparation = Literal["exact", "compiled", "bfloat16", "none"]
"""Preparation of a model for many passes: `exact` keeps scores to 1e-5, `compiled` (torch.compile, on top of it) as
well; `bfloat16` (autocast, on top of `exact`) does not; `none` takes the model as it is."""
