"""The configs of a training and of an ensemble; `--help` prints their keys, types, defaults and descriptions."""

from dataclasses import dataclass, field
from typing import Any, Literal

from interp_models.core.written import OptionsOf, PathText
from interp_models.evaluation.config import ValidationConfig
from interp_models.training.config import AttentionConfig, DistillationConfig, LoggerConfig
from interp_models.training.recipe import Optimizer, Phase


@dataclass
class TrainConfig:
    """The keys of a training's config (`train.py`)."""

    experiment: str = "quickstart"
    """Name of the folder below `runs` and of the group in Weights & Biases."""
    seed: int = 0
    """Seed of everything random."""
    out: PathText | None = None
    """Run folder; null makes runs/<experiment>/<seed>-<n>."""
    plugins: list[PathText] = field(default_factory=list)
    """Files and packages to import first; they register your own methods. A relative file path starts at the yaml that
    names it, or at the working folder if it is given on the command line."""
    data: OptionsOf = field(default_factory=dict)
    """Options of the data module; `dataset` holds the data set's `name` and options."""
    model: OptionsOf = field(default_factory=dict)
    """`name` of the model and its options."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Knowledge distillation from a trained run."""
    feature_cache: PathText | None = None
    """Folder of cached features. In the first phases, up to the first that trains the backbone, its features are
    computed once and replace the training and validation images; null passes images through the backbone at every step.
    """
    feature_copies: int = 0
    """Number of augmented copies of each training image in the feature cache. Epoch e reads copy e modulo this number.
    0 has one copy without augmentation."""
    phases: list[Phase] = field(default_factory=list)
    """The phases of the training, in their order."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Options of pytorch_lightning.Trainer, passed on unchanged."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Loggers."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Pictures of the model's own maps during training."""
    evaluation: ValidationConfig = field(default_factory=ValidationConfig)
    """Metrics of maps on validation images during training."""


@dataclass
class EnsembleConfig:
    """The keys of an ensemble's config (`evaluate.py --ensemble`)."""

    ckpt: Literal["best", "last"] = "best"
    """Checkpoint of each run: `best` validation epoch or `last` epoch."""
    out: PathText | None = None
    """Folder of the accuracies; null makes runs/ensembles/<n>."""
    seed: int = 0
    """Seed of everything random."""
    batch_size: int | None = None
    """Images per test batch; null takes the run's own."""
    dataset: OptionsOf = field(default_factory=dict)
    """Options of the data set that differ from those of the training, such as `root`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Options of pytorch_lightning.Trainer, passed on unchanged."""
    plugins: list[str] = field(default_factory=list)
    """Files and packages to import first; they register the methods that the runs use."""
