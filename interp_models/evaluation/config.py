"""Options of an evaluation of maps."""

from dataclasses import dataclass, field
from typing import Any

from interp_models.core.choices import Preparation
from interp_models.core.written import ListOfOptions


@dataclass
class ExplanationConfig:
    """Which maps are judged, by which metrics, and how."""

    explainers: ListOfOptions = field(default_factory=lambda: ["intrinsic", "gradcam", "activation_map", "random"])
    """Names, or mappings with `name`, options and an optional `label` for the table."""
    metrics: list[str] = field(default_factory=lambda: ["ad", "iic", "add", "ag", "dauc", "dc", "iauc", "ic"])
    """Keys of metrics."""
    preset: str = "gomez2023"
    """Protocol: `gomez2023` or `saliency-maps-metrics`."""
    grid: Any = None
    """Cells that every map is brought to: [rows, columns], `native`, or null: the coarsest of the models' last feature
    grids."""
    max_steps: int = 196
    """Most steps of a deletion or insertion curve; a grid with more cells removes several at a step."""
    target: Any = "prediction"
    """Class that is explained: `prediction`, `label`, or a class number."""
    batch: int | None = None
    """Images per pass of the metrics; null chooses by the device. Explainers have an option of their own."""
    preparation: Preparation = "exact"
    """How the model is made ready for many passes: `exact`, `compiled`, `bfloat16` or `none`."""
    n_images: int | None = None
    """Images that are judged, drawn by seed; null takes all."""


@dataclass
class ValidationConfig(ExplanationConfig):
    """Judging maps on validation images during training."""

    every_n_epochs: int = 0
    """0 never does."""
