"""Every file of this package registers what it holds."""

from interp_models.core.discovery import import_all
from interp_models.training.module import MODELS

import_all(__name__, __path__)

__all__ = ["MODELS"]
