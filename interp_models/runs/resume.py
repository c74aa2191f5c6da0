"""What a run that goes on may change, and what it must find as it was."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf

from interp_models.config.loading import as_dict, check
from interp_models.core.errors import InputError
from interp_models.data.contents import content_digests, together
from interp_models.data.module import DataModule
from interp_models.data.subsets import spread
from interp_models.runs.building import resolve
from interp_models.runs.config import TrainConfig
from interp_models.training.checkpoints import read_checkpoint
from interp_models.training.recipe import Phase, Recipe

PLACES = (
    "data.dataset.root",
    "data.num_workers",
    "data.dataset.list",
    "distillation.teacher",
    "feature_cache",
    "plugins",
)
"""Of the config: where images, teacher and plugins lie, and how they are read. Images and teacher are checked by their
digests."""
CHANGEABLE = ("phases", "trainer", "logger", *PLACES)
LOOKED_AT = 10_000
"""Most images of each split whose files are compared: reading more would take as long as training on them."""
KEPT = {
    "data.batch_size": "the steps of an epoch and the images of each step would change",
    "data": "the images or their form would change in the middle of the training",
    "model": "the checkpoint holds this model",
    "distillation": "the loss would change in the middle of the training",
    "optimizer": "the checkpoint holds the state of this optimizer",
    "seed": "the split, the order and the augmentation of the images are drawn by it",
    "experiment": "the run stays in its folder",
    "out": "the run stays in its folder",
    "attention": "all epochs of a run are watched alike",
    "evaluation": "all epochs of a run are judged alike",
}
"""Why each other key cannot change; the first entry that matches a key gives the reason."""


def check_assignment(assignment: str) -> None:
    """Raise `InputError`, with the reason, unless a run that goes on can change the key of this `key=value`."""
    key = assignment.partition("=")[0]
    if not _is_among(key, CHANGEABLE):
        why = _reason(key)
        raise InputError(
            f"{assignment}: a resumed run can change {', '.join(CHANGEABLE)} only{f' ({why})' if why else ''}"
        )


class Resumed(NamedTuple):
    """The checkpoint that a training goes on with."""

    path: Path
    content: dict[str, Any]


def checkpoint_of(run: Path, config: TrainConfig) -> Resumed | None:
    """The last checkpoint of a run that goes on with a resolved config; None if it was stopped before its first.

    Raises:
        InputError: if the checkpoint is missing among others, or the config changes what a run that goes on cannot.
    """
    last = last_checkpoint(run)
    if not last.is_file():
        if any(last.parent.glob("*.ckpt")):
            raise InputError(f"{last} is missing, without which the training would begin anew over what is there")
        return None
    checkpoint = read_checkpoint(last)
    check_config(last, checkpoint, config)
    check_epochs(last, checkpoint, config)
    return Resumed(last, checkpoint)


def last_checkpoint(run: Path) -> Path:
    """Where the last checkpoint of a run is, once there is one."""
    return run / "checkpoints" / "last.ckpt"


def check_config(last: Path, checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise `InputError` if a resolved config says something else than the checkpoint was trained with, of what a run
    that goes on cannot change."""
    # A checkpoint names no code to import: the plugins are those of the run's config.
    written = as_dict(resolve(check(TrainConfig, {**checkpoint["interp_models"]["config"], "plugins": []})))
    now = as_dict(config)
    for group in ("data", "model", "distillation", "optimizer", "seed"):
        for key, before, after in _differences(group, written[group], now[group]):
            moved = before is not None and after is not None  # no path that was there came or went
            if not _is_among(key, CHANGEABLE) or (key == "distillation.teacher" and not moved):
                raise InputError(
                    f"{last}: was trained with {key} {before!r}, the config now says {after!r}; {_reason(key)}"
                )


def keep_places(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A config to be saved, with the places of the one before: other ones count for one command, as they may be those
    of another machine."""
    kept, was = OmegaConf.create(dict(config)), OmegaConf.create(dict(before))
    for key in PLACES:
        if OmegaConf.select(kept, key) is not None:
            OmegaConf.update(kept, key, OmegaConf.select(was, key))
    return cast(dict[str, Any], OmegaConf.to_container(kept))


def check_same_data(last: Path, checkpoint: Mapping[str, Any], data: DataModule) -> dict[str, list[Any]]:
    """The `images_of` the data; `InputError` unless classes, training and validation images are those of the
    checkpoint."""
    own = checkpoint["interp_models"]
    check_same_classes(own.get("classes", data.classes), data.classes, str(last))
    if "images" not in own and len(data.train_images.validation):
        raise InputError(
            f"{last}: comes from a version that drew validation images from train/; now val/ holds them. Take val/ "
            "away to go on as before, or begin a new run"
        )
    images = images_of(data)
    for split, before in own.get("images", {}).items():
        now = images[split]
        if now[0] != before[0]:
            raise InputError(f"{last}: was trained with {before[0]} {split} images, the data set now has {now[0]}")
        for what, was, is_now in zip(("names, labels or order", "files"), before[1:], now[1:], strict=True):
            if was != is_now:
                raise InputError(f"{last}: was trained with other {split} images; their {what} differ")
    return images


def check_same_classes(before: Sequence[str], now: Sequence[str], whose: str) -> None:
    """Raise `InputError`, naming the first difference, unless a data set has these classes in this order.

    Args:
        before: those that a checkpoint was trained on.
        now: those of the data set.
        whose: begins the message.
    """
    for label, (was, name) in enumerate(zip(before, now, strict=False)):
        if was != name:
            raise InputError(f"{whose}: was trained with {was!r} as class {label}, the data set has {name!r} there")
    if len(before) != len(now):
        missing = len(before) > len(now)
        first = (before if missing else now)[min(len(before), len(now))]
        raise InputError(
            f"{whose}: was trained with {len(before)} classes, the data set has {len(now)}: {first!r} is "
            f"{'missing' if missing else 'new'}"
        )


def images_to_train_on(data: DataModule, resumed: Resumed | None) -> dict[str, list[Any]]:
    """The `images_of` the data; `InputError` if a training goes on and was begun with others."""
    return images_of(data) if resumed is None else check_same_data(resumed.path, resumed.content, data)


def images_of(data: DataModule) -> dict[str, list[Any]]:
    """The number of training and of validation images, and what tells one set of them from another; for a checkpoint.

    Names, order, labels and ground truth count, and the contents of the files, of `LOOKED_AT` evenly spread ones at
    most; the folder they lie in does not.
    """
    found = {}
    for split, indices in (("train", data.train_indices), ("val", data.val_indices)):
        if len(indices) <= LOOKED_AT:
            contents = data.contents(split)  # kept, so that a push need not read the files again
        else:
            some = indices[spread(len(indices), LOOKED_AT)].tolist()
            contents = content_digests(data.train_images, some, shown=True)
        found[split] = [len(indices), data.fingerprint(split), together(contents)]
    return found


def check_epochs(last: Path, checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise `InputError` if the phases end before the epochs that a run has done, or say something else of them."""
    done = int(checkpoint["epoch"]) + 1
    if (wanted := sum(phase.epochs for phase in config.phases)) < done:
        raise InputError(f"{last}: {done} epochs are done, the phases have {wanted}")
    before = [Phase(**phase) for phase in checkpoint["interp_models"]["config"]["phases"]]
    for epoch in range(done):
        was, now_is = (Recipe(phases).at(epoch) for phases in (before, config.phases))
        if (was[0].name, was[1]) != (now_is[0].name, now_is[1]):
            raise InputError(
                f"{last}: epoch {epoch} was number {was[1]} of phase {was[0].name!r}, phases say {now_is[1]} of "
                f"{now_is[0].name!r}; only epochs that are not done can change"
            )


def _differences(key: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The keys below one that have other values, with both."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            yield from _differences(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield key, before, now


def _is_among(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith((f"{group}.", f"{group}[")) for group in groups)


def _reason(key: str) -> str:
    return next((why for group, why in KEPT.items() if _is_among(key, (group,))), "")
