"""Configs: yaml files, `extends`, overrides from the command line, and the schema of the two scripts."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from interp_models.files import write_whole
from interp_models.prepared import Preparation
from interp_models.registry import parse
from interp_models.training.recipe import Optimizer, Phase
from interp_models.written import ListOfOptions, OptionsOf, PathText, values
from interp_models.yaml_files import chain, overridden

Mode = Literal["offline", "online", "disabled"]


@dataclass
class LoggerConfig:
    """Where numbers and pictures go beside `metrics.csv`, which is always written."""

    wandb: Mode = "offline"
    """Weights & Biases: `offline` writes files to sync later, `online` sends, `disabled` does nothing."""
    project: str = "interp_models"
    """Project in Weights & Biases."""
    tensorboard: bool = False
    """Also write TensorBoard files (extra `tensorboard`)."""


@dataclass
class AttentionConfig:
    """Pictures of the model's own maps during training."""

    every_n_epochs: int = 1
    """0 logs none."""
    n_images: int = 8
    """Validation images, spread over them all."""


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
    scorer: Preparation = "exact"
    """How the model is made ready for many passes: `exact`, `compiled`, `bfloat16`, or `plain`: passed as it is."""
    n_images: int | None = None
    """Images that are judged, drawn by seed; null takes all."""


@dataclass
class ValidationConfig(ExplanationConfig):
    """Judging maps on validation images during training."""

    every_n_epochs: int = 0
    """0 never does."""


@dataclass
class DistillationConfig:
    """Learning from a trained run beside the labels."""

    teacher: PathText | None = None
    """Run folder; null has no teacher."""
    temperature: float = 6.0
    """T, by which logits are divided."""
    weight: float = 0.5
    """λ: of the teacher's term, times T²; the loss itself is multiplied by 1 - λ."""


@dataclass
class TrainConfig:
    """What `train.py` can be told."""

    experiment: str = "quickstart"
    """Name of the folder below `runs` and of the group in Weights & Biases."""
    seed: int = 0
    """Of everything random."""
    out: PathText | None = None
    """Run folder; null makes runs/<experiment>/<seed>-<n>."""
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

    ckpt: Literal["best", "last"] = "best"
    """Which checkpoint."""
    ensemble: list[PathText] = field(default_factory=list)
    """Runs whose class probabilities are averaged, in place of runs to compare; only accuracy is measured."""
    out: PathText | None = None
    """Folder of one run's evaluation, or of a comparison or ensemble of several runs; null takes RUN/evaluation, or
    makes runs/comparisons/<n> or runs/ensembles/<n>."""
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


def load_yaml(path: Path) -> dict[str, Any]:
    """A yaml file with its base merged in: `extends: FILE` is relative to the file, and may extend another.

    Raises:
        InputError: if a file is missing or malformed, or extends itself.
    """
    return typing.cast(dict[str, Any], values(chain(path)))


def override(node: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `key=value` one by one; lists are addressed by `phases[0].epochs=1`, values are yaml.

    A value replaces what was there, also a list or a mapping: `phases[0].lrs={head: 0.1}` freezes the other groups.

    Raises:
        InputError: for a malformed assignment, a list position that does not exist, or an interpolation that leads
            nowhere.
    """
    return typing.cast(dict[str, Any], values(overridden(node, assignments)))


def configured(schema: type, source: Path | Mapping[str, Any], assignments: Sequence[str] = ()) -> Any:
    """The config of a yaml file (or of a node) with overrides, as an instance of its schema.

    Unlike `override` of `load_yaml`, it leaves text as it is written: `experiment=007` is not 7. Options of the data
    set, the model and explainers are read when their own schemas are known, those of a training by `runs.resolve`.

    Raises:
        InputError: as `load_yaml`, `override` and `check`.
    """
    return check(schema, overridden(chain(source) if isinstance(source, Path) else source, assignments))


def check(schema: type, node: Mapping[str, Any]) -> Any:
    """The config as an instance of its schema; unknown keys and wrong types raise `InputError`."""
    return schema(**parse(schema, node, "config"))


def plain(config: Any) -> dict[str, Any]:
    """A config as plain containers, to be saved as yaml and in checkpoints."""
    return typing.cast(dict[str, Any], values(dataclasses.asdict(config)))


def save_yaml(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config that `load_yaml` reads back the same."""
    # OmegaConf reads 1e-3 as a number, yaml does not: only OmegaConf's own dumper quotes a string like that.
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def describe(schema: type, indent: str = "  ") -> str:
    """The keys of a schema with types, defaults and meanings, for `--help`."""
    lines = []
    notes = attribute_notes(schema)
    for item in dataclasses.fields(schema):
        default = item.default if item.default is not dataclasses.MISSING else None
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        hint = typing.get_type_hints(schema)[item.name]
        if dataclasses.is_dataclass(default):
            lines.append(f"{indent}{item.name}.   {notes.get(item.name, '')}".rstrip())
            lines.append(describe(type(default), indent + "  "))
        elif typing.get_origin(hint) is list and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            lines.append(f"{indent}{item.name}[i].   {notes.get(item.name, '')}".rstrip())
            lines.append(describe(typing.get_args(hint)[0], indent + "  "))
        else:
            shown = "(must be given)" if default == "???" else f"= {default}"
            lines.append(f"{indent}{item.name}: {_shown(hint)} {shown}   {notes.get(item.name, '')}".rstrip())
    return "\n".join(lines)


def _shown(hint: Any) -> str:
    """A type as it is written in source."""
    if typing.get_origin(hint) is typing.Union:  # of which typing makes Optional[...] where it strips what is annotated
        return " | ".join("None" if member is type(None) else _shown(member) for member in typing.get_args(hint))
    return str(hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint).replace("typing.", "")


def attribute_notes(schema: type) -> dict[str, str]:
    """The docstrings under a dataclass's fields, one line each, bases included."""
    import ast
    import inspect
    import textwrap

    notes: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue  # made at run time, by schema_of
        assert isinstance(body, ast.ClassDef)
        for left, right in zip(body.body, body.body[1:], strict=False):
            if isinstance(left, ast.AnnAssign) and isinstance(left.target, ast.Name) and isinstance(right, ast.Expr):
                notes[left.target.id] = " ".join(str(typing.cast(ast.Constant, right.value).value).split())
    return notes
