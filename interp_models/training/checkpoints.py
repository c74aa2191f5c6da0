"""Checkpoints: when they are written, whole or not at all, and how they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from interp_models.core.errors import InputError, first_line
from interp_models.core.files import whole
from interp_models.training.module import FORMAT_VERSION, InterpModule

Ckpt = Literal["best", "last"]


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
