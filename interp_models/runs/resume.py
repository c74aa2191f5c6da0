"""Check that a resumed run has the config, the images and the classes that it began with."""

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
"""Config keys that say where images, teacher and plugins lie, and how they are read. They may change: images and
teacher are compared by digests."""
CHANGEABLE = ("phases", "trainer", "logger", *PLACES)
LOOKED_AT = 10_000
"""At most so many files of each split are compared; to read more would take as long as to train on them."""
KEPT = {
    "data.batch_size": "the steps of an epoch and the images of each step would change",
    "data": "the images or their form would change in the middle of the training",
    "model": "the checkpoint holds this model",
    "distillation": "the loss would change in the middle of the training",
    "optimizer": "the checkpoint holds the state of this optimizer",
    "seed": "the split, the order and the augmentation of the images are drawn by it",
    "feature_copies": "the copies that its epochs read would change",
    "experiment": "the run stays in its folder",
    "out": "the run stays in its folder",
    "attention": "all epochs of a run must be drawn in the same way",
    "evaluation": "all epochs of a run must be judged in the same way",
}
"""The reason why each other key cannot change. The first entry that matches a key holds."""


def check_assignment(assignment: str) -> None:
    """Raise `InputError`, with the reason, if a resumed run cannot change the key of this `key=value`."""
    key = assignment.partition("=")[0]
    if not _is_among(key, CHANGEABLE):
        why = _reason(key)
        raise InputError(
            f"{assignment}: a resumed run can change {', '.join(CHANGEABLE)} only{f' ({why})' if why else ''}"
        )


class Resumed(NamedTuple):
    """The checkpoint of a resumed training: its path and its content."""

    path: Path
    content: dict[str, Any]


def checkpoint_of(run: Path, config: TrainConfig) -> Resumed | None:
    """Read the last checkpoint of a run that is to be resumed.

    Args:
        run: the run folder.
        config: the resolved config of the resumed training.

    Returns:
        The checkpoint; None if the run was stopped before it wrote one.

    Raises:
        InputError: if `last.ckpt` is missing beside other checkpoints, or the config changes a key that a resumed run
            cannot change.
    """
    last = last_checkpoint(run)
    if not last.is_file():
        if any(last.parent.glob("*.ckpt")):
            raise InputError(f"{last} is missing; without it the training would start again and overwrite this run")
        return None
    checkpoint = read_checkpoint(last)
    check_config(last, checkpoint, config)
    check_epochs(last, checkpoint, config)
    return Resumed(last, checkpoint)


def last_checkpoint(run: Path) -> Path:
    """The path of a run's last checkpoint, which may not exist yet."""
    return run / "checkpoints" / "last.ckpt"


def check_config(last: Path, checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise `InputError` if the resolved config changes a key that a resumed run cannot change."""
    # Never import code that a checkpoint names: the plugins are those of the run's config.
    written = as_dict(resolve(check(TrainConfig, {**checkpoint["interp_models"]["config"], "plugins": []})))
    now = as_dict(config)
    for group in ("data", "model", "distillation", "optimizer", "seed", "feature_copies"):
        for key, before, after in _differences(group, written[group], now[group]):
            moved = before is not None and after is not None  # a path may change, but not appear or vanish
            if not _is_among(key, CHANGEABLE) or (key == "distillation.teacher" and not moved):
                raise InputError(
                    f"{last}: was trained with {key} {before!r}, the config now says {after!r}; {_reason(key)}"
                )


def keep_places(config: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The config to save for a resumed run: `config`, with the `PLACES` of `before`.

    Changed places count for one command only, as they may be those of another machine.
    """
    kept, was = OmegaConf.create(dict(config)), OmegaConf.create(dict(before))
    for key in PLACES:
        if OmegaConf.select(kept, key) is not None:
            OmegaConf.update(kept, key, OmegaConf.select(was, key))
    return cast(dict[str, Any], OmegaConf.to_container(kept))


def check_same_data(last: Path, checkpoint: Mapping[str, Any], data: DataModule) -> dict[str, list[Any]]:
    """Compare classes, training and validation images with those of a checkpoint.

    Returns:
        `images_of(data)`.

    Raises:
        InputError: if they differ.
    """
    own = checkpoint["interp_models"]
    check_same_classes(own.get("classes", data.classes), data.classes, str(last))
    check_same_task(own.get("task", "classes"), data, str(last))
    if "images" not in own and len(data.train_images.validation):
        raise InputError(
            f"{last}: comes from a version that drew validation images from train/; now val/ holds them. Remove "
            "val/ to continue as before, or start a new run"
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
    """Raise `InputError`, with the first difference, unless a data set has the same classes in the same order.

    Args:
        before: class names that a checkpoint was trained on.
        now: class names of the data set.
        whose: the checkpoint, as the message names it.
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


def check_same_task(task: str, data: DataModule, whose: str) -> None:
    """Raise `InputError` if a model's task is not that of the data: one class per image, or several labels.

    Args:
        task: the model's task.
        data: the data set.
        whose: the model, as the message names it.
    """
    if (task == "labels") != data.multilabel:
        trained, now = ("several labels", "one class") if task == "labels" else ("one class", "several labels")
        raise InputError(f"{whose}: was trained for {trained} per image, the images of the data set have {now}")


def images_to_train_on(data: DataModule, resumed: Resumed | None) -> dict[str, list[Any]]:
    """`images_of(data)`; raises `InputError` if a resumed training began with other images."""
    return images_of(data) if resumed is None else check_same_data(resumed.path, resumed.content, data)


def images_of(data: DataModule) -> dict[str, list[Any]]:
    """What a checkpoint records about its images: for `train` and `val`, their number and two digests.

    The first digest covers names, order, labels and ground truth. The second covers the contents of the files, at most
    `LOOKED_AT` of them, evenly spread. The folder of the images does not matter.
    """
    found = {}
    for split, indices in (("train", data.train_indices), ("val", data.val_indices)):
        if len(indices) <= LOOKED_AT:
            contents = data.contents(split)  # cached, so that a push need not read the files again
        else:
            some = indices[spread(len(indices), LOOKED_AT)].tolist()
            contents = content_digests(data.train_images, some, shown=True)
        found[split] = [len(indices), data.fingerprint(split), together(contents)]
    return found


def check_epochs(last: Path, checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise `InputError` if the phases end before the finished epochs of a run, or change the phase of one of them."""
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
    """Each key below `key` whose value differs, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            yield from _differences(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield key, before, now


def _is_among(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith((f"{group}.", f"{group}[")) for group in groups)


def _reason(key: str) -> str:
    return next((why for group, why in KEPT.items() if _is_among(key, (group,))), "")
