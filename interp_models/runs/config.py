"""What the two commands can be told."""

from dataclasses import dataclass, field
from typing import Any, Literal

from interp_models.core.written import ListOfOptions, OptionsOf, PathText
from interp_models.evaluation.config import ExplanationConfig, ValidationConfig
from interp_models.training.config import AttentionConfig, DistillationConfig, LoggerConfig
from interp_models.training.recipe import Optimizer, Phase


@dataclass
class TrainConfig:
    """What `train.py` can be told."""

    experiment: str = "quickstart"
    """Name of the folder below `runs` and of the group in Weights & Biases."""
    seed: int = 0
    """Of everything random."""
    out: PathText | None = None
    """Run folder; null makes runs/<experiment>/<seed>-<n>."""
    plugins: list[PathText] = field(default_factory=list)
    """Files and packages with methods of one's own, which register themselves; files lie beside the yaml that names
    them, on the command line in the working folder."""
    data: OptionsOf = field(default_factory=dict)
    """Options of the data module; `dataset` holds the data set's `name` and options."""
    model: OptionsOf = field(default_factory=dict)
    """`name` of the model and its options."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """A teacher."""
    feature_cache: PathText | None = None
    """Folder of features of a frozen backbone, computed once and read in place of training and validation images; null
    passes the images at every step."""
    phases: list[Phase] = field(default_factory=list)
    """The timeline of the training."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Passed to pytorch_lightning.Trainer unchanged."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Loggers."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Pictures of the model's own maps."""
    evaluation: ValidationConfig = field(default_factory=ValidationConfig)
    """Metrics of maps during training."""


@dataclass
class EvaluateConfig(ExplanationConfig):
    """What `evaluate.py` can be told."""

    plugins: list[PathText] = field(default_factory=list)
    """As of a training; those of the runs themselves need not be given again."""
    ckpt: Literal["best", "last"] = "best"
    """Which checkpoint."""
    networks: ListOfOptions = field(default_factory=list)
    """Networks that were not trained here, judged beside the runs: `timm:NAME`, `package.module:function`,
    `FILE.py:function`, or keys and values (see `evaluation.networks.NetworkConfig`)."""
    out: PathText | None = None
    """Folder of one model's evaluation, or of a comparison of several; null takes RUN/evaluation (of another network
    runs/networks/<name>), or makes runs/comparisons/<n>."""
    seed: int = 0
    """Of the drawn images; random explainers have a `seed` of their own."""
    prototype_metrics: list[str] = field(default_factory=list)
    """Names of prototype metrics, by which runs with prototypes are judged on all test images."""
    report_images: int = 60
    """Images shown in the report, with all maps."""
    figure: list[str] = field(default_factory=list)
    """Explainers, by label, whose maps of the first run `figure.png` shows on eight images at most, beside every run's
    own maps (the tutorial's figure 8); none draws none."""
    batch_size: int | None = None
    """Images per test batch; null is the run's own."""
    dataset: OptionsOf = field(default_factory=dict)
    """Options of the data set that differ from the training's, such as `root`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Passed to pytorch_lightning.Trainer unchanged."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Loggers."""


@dataclass
class EnsembleConfig:
    """What `evaluate.py --ensemble` can be told."""

    ckpt: Literal["best", "last"] = "best"
    """Which checkpoint."""
    out: PathText | None = None
    """Folder of the accuracies; null makes runs/ensembles/<n>."""
    seed: int = 0
    """Of everything random."""
    batch_size: int | None = None
    """Images per test batch; null is the run's own."""
    dataset: OptionsOf = field(default_factory=dict)
    """Options of the data set that differ from the training's, such as `root`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Passed to pytorch_lightning.Trainer unchanged."""
    plugins: list[str] = field(default_factory=list)
    """Files and packages to import first, which register what the runs need."""
