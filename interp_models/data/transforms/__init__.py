"""Transforms: they prepare images for a model.

Every registered class can be imported from here by its name; its file is imported when the class is first used.
"""

from typing import Any

from interp_models.core.discovery import exported, public_names
from interp_models.data.transforms.base import TRANSFORMS as TRANSFORMS
from interp_models.data.transforms.base import ImageTransform as ImageTransform
from interp_models.data.transforms.base import of_known_range as of_known_range
from interp_models.data.transforms.base import transform_of as transform_of
from interp_models.data.transforms.base import transform_options as transform_options
from interp_models.data.transforms.crops import crop_to_box as crop_to_box
from interp_models.data.transforms.crops import hide_outside as hide_outside

OWN = ["TRANSFORMS", "ImageTransform", "crop_to_box", "hide_outside"]
OWN += ["of_known_range", "transform_of", "transform_options"]


def __getattr__(name: str) -> Any:
    return __dir__() if name == "__all__" else exported(__name__, name)


def __dir__() -> list[str]:
    return public_names(__name__, OWN)
