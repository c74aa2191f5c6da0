"""Data sets, image files and transforms.

Every registered class can be imported from here by its name; its file is imported when the class is first used.
"""

from typing import Any

from interp_models.core.discovery import exported, public_names
from interp_models.data.base import DATASETS as DATASETS
from interp_models.data.transforms.base import TRANSFORMS as TRANSFORMS

OWN = ["DATASETS", "TRANSFORMS"]


def __getattr__(name: str) -> Any:
    return __dir__() if name == "__all__" else exported(__name__, name)


def __dir__() -> list[str]:
    return public_names(__name__, OWN)
