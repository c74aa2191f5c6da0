"""Explainers: saliency maps of any module that returns logits.

Every registered class can be imported from here. Its file is loaded on first use.
"""

from typing import Any

from interp_models.core.discovery import exported, public_names
from interp_models.explainers.base import EXPLAINERS as EXPLAINERS

OWN = ["EXPLAINERS"]


def __getattr__(name: str) -> Any:
    return __dir__() if name == "__all__" else exported(__name__, name)


def __dir__() -> list[str]:
    return public_names(__name__, OWN)
