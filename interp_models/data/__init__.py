"""Every file of this package registers what it holds."""

from interp_models.core.discovery import import_all
from interp_models.data.base import DATASETS

import_all(__name__, __path__)

__all__ = ["DATASETS"]
