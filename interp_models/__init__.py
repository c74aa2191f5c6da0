"""Train image classifiers that explain themselves, and judge their explanations beside post-hoc methods."""

from interp_models.core.outputs import InterpOutput
from interp_models.core.scoring import probabilities
from interp_models.data import DATASETS
from interp_models.data.decoding import open_image
from interp_models.explainers import EXPLAINERS
from interp_models.metrics import METRICS, PROTOTYPE_METRICS
from interp_models.models import MODELS
from interp_models.runs.loading import load
from interp_models.training.module import InterpModule

__all__ = [
    "DATASETS",
    "EXPLAINERS",
    "METRICS",
    "MODELS",
    "PROTOTYPE_METRICS",
    "InterpModule",
    "InterpOutput",
    "load",
    "open_image",
    "probabilities",
]
