"""Options for the evaluation of maps."""

from dataclasses import dataclass, field
from typing import Any

from interp_models.core.choices import Preparation
from interp_models.core.written import ListOfOptions


@dataclass
class ExplanationConfig:
    """Explainers, metrics and protocol of an evaluation."""

    explainers: ListOfOptions = field(default_factory=lambda: ["intrinsic", "gradcam", "activation_map", "random"])
    """Names, or mappings with `name`, options and an optional `label` for the tables."""
    metrics: list[str] = field(default_factory=lambda: ["ad", "iic", "add", "ag", "dauc", "dc", "iauc", "ic"])
    """Keys of metrics."""
    preset: str = "gomez2023"
    """Protocol of the metrics: `gomez2023` or `saliency-maps-metrics`."""
    grid: Any = None
    """Grid to which every map is brought: [rows, columns], `native` for each map's own grid, or null for the coarsest
    of the models' last feature maps."""
    max_steps: int = 196
    """Maximum number of steps of a deletion or insertion curve; on a grid with more cells, a step removes several."""
    target: Any = "prediction"
    """Class to explain: `prediction`, `label`, or a class number."""
    batch: int | None = None
    """Images per forward pass of the metrics; null chooses by the device. Explainers have a `batch` of their own."""
    preparation: Preparation = "exact"
    """How the model is prepared for many passes: `exact`, `compiled`, `bfloat16` or `none`."""
    n_images: int | None = None
    """Number of images to judge, drawn by `seed`; null judges all."""


@dataclass
class ValidationConfig(ExplanationConfig):
    """Evaluation of maps on validation images during training."""

    every_n_epochs: int = 0
    """Number of epochs from one evaluation to the next; 0 never evaluates."""
