"""Run folders: their names, their files, and how a model is had back from them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torchvision.transforms import v2

from interp_models.config import TrainConfig, configured, plain
from interp_models.data.base import DATASETS
from interp_models.data.module import DataModule
from interp_models.data.transforms import of_known_range, plain_transform
from interp_models.errors import InputError, first_line
from interp_models.files import empty_folder, new_folder, whole
from interp_models.misfits import check_fits
from interp_models.registry import named, parse, schema_of
from interp_models.training.module import FORMAT_VERSION, MODELS, InterpModule
from interp_models.training.recipe import Recipe
from interp_models.written import OptionsOf, typed

Ckpt = Literal["best", "last"]


@rank_zero_only
def run_folder(config: TrainConfig, resume: Path | None = None) -> Path | None:
    """The folder of a run: the one that goes on, or a new one; None on other ranks than 0, which write nothing there.

    Args:
        config: names a new folder by `out`, or as runs/<experiment>/<seed>-<n>.
        resume: the run that goes on.

    Raises:
        InputError: if `out` already holds something or cannot be made.
    """
    if resume is not None:
        if not os.access(resume, os.W_OK):
            raise InputError(f"run {resume} cannot be written to")
        return resume
    if config.out is None:
        return new_folder(Path("runs") / config.experiment, f"{config.seed}-")
    return empty_folder(config.out, f"runs are never overwritten (resume={config.out} goes on with it)")


@rank_zero_only
def folder_of_several(out: str | None, kind: str) -> Path | None:
    """Make and return the folder of `comparisons` or `ensembles`: `out`, or runs/<kind>/<n>; None on ranks above 0.

    Raises:
        InputError: if `out` already holds something or cannot be made.
    """
    if out is None:
        return new_folder(Path("runs") / kind)
    return empty_folder(out, f"{kind} are never overwritten")


def run_name(run: Path) -> str:
    """`<experiment>/<seed>-<n>`, or the folder's own name and its parent's."""
    path = run.resolve()
    return f"{path.parent.name}/{path.name}"


class Checkpoint(ModelCheckpoint):
    """One file, written after epochs, that remembers its score also when the run folder has moved since."""

    def __init__(self, run: Path | None, name: Ckpt, monitor: str | None = None) -> None:
        super().__init__(
            dirpath=None if run is None else run / "checkpoints",
            filename=name,
            monitor=monitor,
            mode="max",
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless the best is wanted and the epoch is no candidate."""
        assert isinstance(pl_module, InterpModule)
        if self.monitor is None or pl_module.recipe.selectable(trainer.current_epoch):
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a run, whose paths are those of where it was."""
        old, new = str(state_dict["dirpath"]), str(self.dirpath)
        super().load_state_dict({key: _moved(value, old, new) for key, value in state_dict.items()})


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_moved(key, old, new): item for key, item in value.items()}
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def checkpoints(run: Path | None, *, selecting: bool) -> list[Checkpoint]:
    """The callbacks that write `best.ckpt`, if there is a validation to select on, and `last.ckpt` after every epoch.

    Two, as `save_last` of one would write the last epoch only when it is also the best; the last one comes second, so
    that it knows the best score.
    """
    best = [Checkpoint(run, "best", "val/acc")] if selecting else []
    return [*best, Checkpoint(run, "last")]


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written whole or not at all, and only ever loaded as plain containers of tensors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a partial file first."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:  # of a path, torch.save would not say what failed
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read with `weights_only=True`, whatever is asked for."""
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint as plain containers.

    Raises:
        InputError: if it is missing, broken, no checkpoint of this package, or of a later format.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise InputError(f"checkpoint {path} cannot be read ({first_line(error)})") from None
    own = checkpoint.get("interp_models") if isinstance(checkpoint, dict) else None
    if not isinstance(own, dict) or "format_version" not in own:
        raise InputError(f"checkpoint {path} was not written by interp_models")
    if own["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format {own['format_version']}; this interp_models reads up to {FORMAT_VERSION}"
        )
    return dict(checkpoint)


def run_config(run: Path) -> dict[str, Any]:
    """The config of a run folder with all defaults; raises `InputError` if it is none or its config is not sound."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run folder: it holds no config.yaml")
    try:
        return plain(resolve(configured(TrainConfig, run / "config.yaml")))
    except InputError as error:
        raise InputError(f"run {run}: {error}") from None


def checkpoint_path(run: Path, ckpt: Ckpt) -> Path:
    """The checkpoint of a run; runs without validation have no best one and give their last.

    Raises:
        InputError: if the run holds no such checkpoint.
    """
    if ckpt not in ("best", "last"):
        raise InputError(f"ckpt must be 'best' or 'last'; got {ckpt!r}")
    name = "last" if selection(run_config(run), ckpt) == "last epoch" else "best"
    path = run / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        raise InputError(f"run {run} holds no checkpoint {path.relative_to(run)}")
    return path


def selection(config: Mapping[str, Any], ckpt: Ckpt = "best") -> str:
    """How the model of a run was selected: `best validation epoch` or `last epoch`."""
    fraction = config["data"]["val_fraction"]
    return "best validation epoch" if ckpt == "best" and fraction > 0 else "last epoch"


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with all defaults of data set, data module and model written out, so that it means the same later.

    Raises:
        InputError: for an unknown name or option, or a wrong type.
    """
    data = data_options(vars(config))
    name, options = named(config.model, "model", MODELS)
    check_fits(config, name, options)
    model = {"name": name, **MODELS.options(name, options, given=("num_classes",))}
    return dataclasses.replace(config, data=data, model=model)


def build_model(config: Mapping[str, Any], num_classes: int, *, trained: bool = False) -> InterpModule:
    """The model of a config with its recipe; `trained` leaves the pretrained weights out, as a checkpoint follows.

    Raises:
        InputError: for an unknown model, option or a wrong type.
    """
    name, options = named(config["model"], "model", MODELS)
    if trained:
        options["weights"] = None
    model = MODELS.build(name, options, num_classes=num_classes)
    model.recipe = Recipe(**parse(Recipe, {key: config[key] for key in ("phases", "optimizer")}, "config"))
    model.config = dict(config)
    model.check_recipe()
    return model


def build_data(config: Mapping[str, Any], **changes: Any) -> DataModule:
    """The data module of a config, with changed options of the data module or, in `dataset`, of its data set."""
    return DataModule(**data_options(config, **changes))


def data_options(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The options of the data module, those of the data set in `dataset`, with all defaults; see `build_data`."""
    options = {**config["data"], **{key: value for key, value in changes.items() if key != "dataset"}}
    dataset = typed(OptionsOf, options.get("dataset", {}))
    if not isinstance(dataset, Mapping):
        raise InputError(f"data.dataset: expected keys and values (name and options), got {dataset!r}")
    name, of_dataset = named({**dataset, **changes.get("dataset", {})}, "data.dataset", DATASETS)
    options["dataset"] = {"name": name, **DATASETS.options(name, of_dataset, given=("split",))}
    options.setdefault("seed", int(config.get("seed", 0)))
    return parse(schema_of(DataModule), options, "data")


def load(run: str | Path, ckpt: Ckpt = "best") -> tuple[InterpModule, v2.Transform]:
    """A trained model in eval mode, and the transform that makes its input of an image in [0, 1] or of 8 bits.

    The transform knows no boxes: images of a run with `data.crop_to_box` are to be cropped before.

    Args:
        run: folder that `train.py` wrote.
        ckpt: `best` or `last`.

    Raises:
        InputError: if the folder is no run, holds no checkpoint, or the checkpoint is of another model.
    """
    run = Path(run)
    config = run_config(run)
    checkpoint = read_checkpoint(checkpoint_path(run, ckpt))
    written = checkpoint["interp_models"]["config"].get("model", {})
    if written.get("name") != config["model"].get("name"):
        other, own = written.get("name"), config["model"].get("name")
        raise InputError(f"{run}: the checkpoint is of model {other!r}, config.yaml says {own!r}")
    model = build_model(config, int(checkpoint["interp_models"]["num_classes"]), trained=True)
    load_weights(model, checkpoint, str(run))
    model.classes = tuple(checkpoint["interp_models"].get("classes", ()))
    model.images = checkpoint["interp_models"].get("images", {})
    data = parse(schema_of(DataModule), {"dataset": {}, **config["data"]}, "data")
    transform = plain_transform(data["image_size"], data["transforms"])
    return model.eval(), v2.Compose([of_known_range, v2.RGB(), v2.ToImage(), transform])


def load_weights(model: InterpModule, checkpoint: Mapping[str, Any], where: str) -> None:
    """Load a checkpoint's weights; raises `InputError` naming the first tensor that does not fit."""
    state, own = checkpoint["state_dict"], model.state_dict()
    for key in own:
        if key not in state or state[key].shape != own[key].shape:
            found = (
                f"has shape {tuple(state[key].shape)}, not {tuple(own[key].shape)}" if key in state else "is missing"
            )
            raise InputError(f"{where}: the checkpoint does not fit model {type(model).__name__}: {key!r} {found}")
    if extra := sorted(state.keys() - own.keys()):
        raise InputError(f"{where}: the checkpoint does not fit model {type(model).__name__}: it has {extra[0]!r} too")
    model.load_state_dict(dict(state))
