"""Every file of this package registers what it holds."""

from interp_models.core.discovery import import_all
from interp_models.metrics.base import METRICS
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS

import_all(__name__, __path__)

__all__ = ["METRICS", "PROTOTYPE_METRICS"]
