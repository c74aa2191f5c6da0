"""Options for the evaluation of maps."""

from dataclasses import dataclass, field
from typing import Any, Literal

from interp_models.core.choices import Preparation
from interp_models.core.written import ListOfOptions, OptionsOf, PathText
from interp_models.training.config import LoggerConfig


@dataclass
class ExplanationConfig:
    """Explainers, metrics and protocol of an evaluation."""

    explainers: ListOfOptions = field(default_factory=lambda: ["intrinsic", "gradcam", "activation_map", "random"])
    """Names, or mappings with `name`, options and an optional `label` for the tables."""
    metrics: list[str] = field(default_factory=lambda: ["ad", "iic", "add", "ag", "dauc", "dc", "iauc", "ic"])
    """Keys of metrics, or patterns such as `*_box`."""
    preset: str = "gomez2023"
    """Protocol of the metrics: `gomez2023`, `saliency-maps-metrics`, `rise`, `opticam`, `guidance` or `idsds`."""
    grid: Any = None
    """Grid to which every map is brought: [rows, columns], `native` for each map's own grid, or null for the coarsest
    of the models' last feature maps."""
    max_steps: int | None = None
    """Maximum number of steps of a deletion or insertion curve; on a grid with more cells, a step removes several. Null
    takes the preset's: 196, or 224 where curves remove pixels."""
    target: Any = "prediction"
    """Class to explain: `prediction`, `label`, or a class number."""
    batch: int | None = None
    """Images per forward pass of the metrics; null chooses a size for the device. Explainers have their own `batch`."""
    preparation: Preparation = "exact"
    """How the model is prepared for many passes: `exact`, `compiled`, `bfloat16` or `none`."""
    control: str | None = None
    """Label of the explainer that the others are tested against; null takes `random`, if it is listed."""
    reference: str | None = None
    """Label of the explainer that the page compares the others with; null takes `intrinsic`, else `gradcam`."""
    n_images: int | None = None
    """Number of images to judge, drawn by `seed`; null judges all."""


@dataclass
class ValidationConfig(ExplanationConfig):
    """Evaluation of maps on validation images during training."""

    every_n_epochs: int = 0
    """Number of epochs from one evaluation to the next; 0 never evaluates."""


@dataclass
class StudyConfig:
    """Options of a study with people."""

    trials: int = 24
    """Maximum number of trials per participant, beside two that check attention."""
    participants: int = 24
    """Number of participants for which conditions and orders are balanced. Higher numbers begin again."""
    consent: PathText | None = None
    """Text file that participants must agree to before they begin; null asks for nothing."""


@dataclass
class EvaluateConfig(ExplanationConfig):
    """The keys of an evaluation's config (`evaluate.py`)."""

    plugins: list[PathText] = field(default_factory=list)
    """Files and packages to import first; they register your own methods. The plugins of the runs need not be given
    again."""
    ckpt: Literal["best", "last"] = "best"
    """Checkpoint of each run: `best` validation epoch or `last` epoch."""
    networks: ListOfOptions = field(default_factory=list)
    """Networks that were not trained here, judged beside the runs: `timm:NAME`, `package.module:function`,
    `FILE.py:function`, or keys and values (`--help networks` lists them)."""
    out: PathText | None = None
    """Folder of the results. The default (null) is RUN/evaluation for one run, runs/networks/<name> for one other
    network, and a new folder runs/comparisons/<n> for the comparison of several."""
    seed: int = 0
    """Seed that draws the images; random explainers have a `seed` of their own."""
    prototype_metrics: list[str] = field(default_factory=list)
    """Names of prototype metrics; they judge runs with prototypes on all test images."""
    report_images: int = 60
    """Number of images that the report shows, with all their maps."""
    published: dict[str, Any] = field(default_factory=dict)
    """Published numbers to show beside ours: `source`, and `explainers` with a number by metric (percent for
    percentages); the shipped configs `paper/*` have some."""
    userstudy: str | None = None
    """Task of a study with people, whose page is written beside the report (`--help userstudy` lists the tasks), or
    `read`, which reads the answers back."""
    study: StudyConfig = field(default_factory=StudyConfig)
    """Size and consent text of the study."""
    answers: PathText | None = None
    """Folder of the files that participants saved, for `userstudy=read`."""
    figure: list[str] = field(default_factory=list)
    """Explainers, by label, for `figure.png`: their maps of the first run on at most eight images, beside the own maps
    of every run (figure 8 of the tutorial); an empty list draws no figure."""
    batch_size: int | None = None
    """Images per test batch; null takes the run's own."""
    dataset: OptionsOf = field(default_factory=dict)
    """Options of the data set that differ from those of the training, such as `root`."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Options of pytorch_lightning.Trainer, passed on unchanged."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Loggers."""
