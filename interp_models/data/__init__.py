"""Every file of this package registers what it holds."""

from interp_models.data.base import DATASETS
from interp_models.discovery import import_all

import_all(__name__, __path__)

__all__ = ["DATASETS"]
