"""What images go through before a model sees them. Every file of this package registers what it holds."""

from interp_models.core.discovery import import_all
from interp_models.data.transforms.base import (
    TRANSFORMS,
    ImageTransform,
    of_known_range,
    transform_of,
    transform_options,
)
from interp_models.data.transforms.crops import crop_to_box, hide_outside

import_all(__name__, __path__)

__all__ = [
    "TRANSFORMS",
    "ImageTransform",
    "crop_to_box",
    "hide_outside",
    "of_known_range",
    "transform_of",
    "transform_options",
]
