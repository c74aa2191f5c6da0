"""Checkpoints: when they are written, and how they are read. A file is written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from interp_models.core.errors import InputError, first_line
from interp_models.core.files import whole
from interp_models.training.module import FORMAT_VERSION, LABELS_VERSION, InterpModule

Ckpt = Literal["best", "last"]


class Checkpoint(ModelCheckpoint):
    """Writes `best.ckpt` or `last.ckpt` after an epoch; a resumed run finds the best score even if its folder moved."""

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
        """Save; `best` considers only epochs that the phase's `select` admits."""
        assert isinstance(pl_module, InterpModule)
        if self.monitor is None or pl_module.recipe.selectable(trainer.current_epoch):
            super().on_train_epoch_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the callback's state, with its paths changed to the folder where the run is now."""
        old, new = str(state_dict["dirpath"]), str(self.dirpath)
        super().load_state_dict({key: _moved(value, old, new) for key, value in state_dict.items()})


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, dict):
        return {_moved(key, old, new): item for key, item in value.items()}
    return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value


def checkpoints(run: Path | None, *, selecting: bool, measured: str = "acc") -> list[Checkpoint]:
    """The callbacks that write `last.ckpt` after every epoch and, with validation images, `best.ckpt`.

    There are two because `save_last` of a single one would write the last epoch only if it is the best. `last` comes
    second, so that it holds the best score.

    Args:
        run: the run folder; None on ranks that do not write.
        selecting: whether there are validation images to select on.
        measured: `key` of the model's `Measure`; the epoch with the highest `val/<measured>` is the best.
    """
    best = [Checkpoint(run, "best", f"val/{measured}")] if selecting else []
    return [*best, Checkpoint(run, "last")]


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and loads them only with `weights_only=True`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a partial file, then rename it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:  # given a path, torch.save hides the cause of an error
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read with `weights_only=True`; the argument is ignored."""
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint as plain containers of tensors.

    Raises:
        InputError: if it is missing, broken, not a checkpoint of this package, or of a newer format.
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
    if own["format_version"] > LABELS_VERSION:
        raise InputError(
            f"checkpoint {path} has format {own['format_version']}; this interp_models reads up to {FORMAT_VERSION}, "
            f"and {LABELS_VERSION} of several labels per image"
        )
    return dict(checkpoint)


def load_weights(model: InterpModule, checkpoint: Mapping[str, Any], where: str) -> None:
    """Load the weights of a checkpoint into a model.

    Args:
        model: the model.
        checkpoint: as `read_checkpoint` returns it.
        where: the run, as messages name it.

    Raises:
        InputError: with the name of the first tensor that is missing, superfluous or of another shape.
    """
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
