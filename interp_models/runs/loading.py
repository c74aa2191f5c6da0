"""Load a trained model from its run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchvision.transforms import v2

from interp_models.config.loading import as_dict, configured
from interp_models.core.errors import InputError
from interp_models.core.plugins import import_plugins
from interp_models.core.schema import parse, schema_of
from interp_models.data.module import DataModule
from interp_models.data.transforms import of_known_range, transform_of
from interp_models.runs.building import build_model, resolve
from interp_models.runs.config import TrainConfig
from interp_models.training.checkpoints import Ckpt, load_weights, read_checkpoint
from interp_models.training.module import InterpModule


def run_config(run: Path) -> dict[str, Any]:
    """The resolved config of a run folder, as plain containers.

    Raises:
        InputError: if the folder is not a run, or its config is not valid.
    """
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run folder: it holds no config.yaml")
    try:
        return as_dict(resolve(configured(TrainConfig, run / "config.yaml")))
    except InputError as error:
        raise InputError(f"run {run}: {error}") from None


def checkpoint_path(run: Path, ckpt: Ckpt) -> Path:
    """The path of a run's checkpoint. A run without validation images has no best one; its last one is returned.

    Raises:
        InputError: if the run does not have this checkpoint.
    """
    if ckpt not in ("best", "last"):
        raise InputError(f"ckpt must be 'best' or 'last'; got {ckpt!r}")
    name = "last" if selection(run_config(run), ckpt) == "last epoch" else "best"
    path = run / "checkpoints" / f"{name}.ckpt"
    if not path.is_file():
        raise InputError(f"run {run} holds no checkpoint {path.relative_to(run)}")
    return path


def selection(config: Mapping[str, Any], ckpt: Ckpt = "best") -> str:
    """How the weights of a run were selected: `best validation epoch` or `last epoch`."""
    fraction = config["data"]["val_fraction"]
    return "best validation epoch" if ckpt == "best" and fraction > 0 else "last epoch"


def load(
    run: str | Path, ckpt: Ckpt = "best", *, plugins: Sequence[str | Path] = ()
) -> tuple[InterpModule, v2.Transform]:
    """Load a trained model and the transform of its test images.

    The transform does not crop to boxes: crop images yourself if the run was trained with `data.crop_to_box`.

    Args:
        run: a run folder, written by `train.py`.
        ckpt: `best` (validation epoch) or `last` (epoch).
        plugins: files and packages to import first. Plugins that the run's config names are imported anyway; give them
            here only if they have moved.

    Returns:
        The model in eval mode on the CPU, and a transform. The transform takes an image (a PIL image, or a tensor of
        8-bit values or of floats in [0, 1]) and returns the model's input: (3, H, W) in [0, 1], without the batch
        dimension.

    Raises:
        InputError: if the folder is not a run or has no such checkpoint, if the checkpoint belongs to another model
            than the config, or if a plugin cannot be imported.
    """
    run = Path(run)
    import_plugins([str(plugin) for plugin in plugins])
    config = run_config(run)
    checkpoint = read_checkpoint(checkpoint_path(run, ckpt))
    written = checkpoint["interp_models"]["config"].get("model", {})
    if written.get("name") != config["model"].get("name"):
        other, own = written.get("name"), config["model"].get("name")
        raise InputError(f"{run}: the checkpoint is of model {other!r}, config.yaml says {own!r}")
    own = checkpoint["interp_models"]
    about = {key: own[key] for key in ("classes", "images", "task") if key in own}
    model = build_model(config, int(own["num_classes"]), trained=True, **about)
    load_weights(model, checkpoint, str(run))
    data = parse(schema_of(DataModule), {"dataset": {}, **config["data"]}, "data")
    transform = transform_of(data["transforms"], data["image_size"]).evaluation()
    return model.eval(), v2.Compose([of_known_range, v2.RGB(), v2.ToImage(), transform])
