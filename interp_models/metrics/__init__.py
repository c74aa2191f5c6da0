"""Metrics of saliency maps and of prototypes.

Every registered class can be imported from here. Its file is loaded on first use.
"""

from typing import Any

from interp_models.core.discovery import exported, public_names
from interp_models.core.truth import Truth as Truth
from interp_models.metrics.base import METRICS as METRICS
from interp_models.metrics.case import Case as Case
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS as PROTOTYPE_METRICS

OWN = ["METRICS", "PROTOTYPE_METRICS", "Case", "Truth"]


def __getattr__(name: str) -> Any:
    return __dir__() if name == "__all__" else exported(__name__, name)


def __dir__() -> list[str]:
    return public_names(__name__, OWN)
