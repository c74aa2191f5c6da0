"""Time of an epoch on cached features ÷ an epoch on images, of the first phase of configs.

An epoch is its training steps and its validation by Lightning, as `train.py` runs them. On images the frozen trunk runs
without gradients. The time that fills the cache is given beside them: it is paid once.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.harness import Row, Timing, Value, plain_parser, summary, write
from benchmarks.tables import show
from interp_models.config.loading import as_dict, configured
from interp_models.core.errors import InputError
from interp_models.runs.building import build_data, build_model, resolve
from interp_models.runs.config import TrainConfig
from interp_models.training.feature_cache import FeatureCache, phases_on_features
from interp_models.training.schedule import PhaseSchedule
from interp_models.training.trainer import quiet

CONFIGS = ("dpnet_lite0", "protopnet_lite0", "prototree_lite0", "protopnet_dinov2", "prototree_dinov2")


class EpochTimes(pl.Callback):
    """Seconds from the start of the training to its first step, and of every epoch with its validation."""

    def __init__(self) -> None:
        self.begun, self.before = time.perf_counter(), 0.0
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock of an epoch."""
        self.start = time.perf_counter()
        if not self.seconds:
            self.before = self.start - self.begun

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock of an epoch."""
        self.seconds.append(time.perf_counter() - self.start)


def epochs(config: Mapping[str, Any], cache: FeatureCache | None) -> EpochTimes:
    """Times of a training with a resolved config, on images or on features."""
    data = build_data(config)
    model = build_model(config, len(data.classes))
    times = EpochTimes()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=model.recipe.epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[*([] if cache is None else [cache]), times, PhaseSchedule()],
    )  # fmt: skip
    trainer.fit(model, data)
    return times


def compared(what: str, config: Mapping[str, Any], copies: int, pairs: int) -> list[Row]:
    """Epochs on features ÷ epochs on images, one pair of trainings after the other, without their first epochs.

    Args:
        what: name of the row.
        config: a resolved config with one phase on a frozen trunk. Its number of epochs does not matter.
        copies: see `cache_features`.
        pairs: number of trainings on images and on features.
    """
    found, filled = [], []
    phase = {**config["phases"][0], "on_end": [], "select": "last"}
    few, many = ({**config, "phases": [{**phase, "epochs": count}]} for count in (2, 8))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(pairs):
            on_images = epochs(few, None).seconds[1]
            on_features = epochs(many, FeatureCache(Path(folder), copies))
            filled.append(on_features.before)
            found.append((median(on_features.seconds[1:]), on_images))
    timing = Timing(f"{what}'s epoch on stored features", "its epoch on images", None, None, summary(found), 1, found)
    # Only the first training of a pair fills the cache.
    return [timing, Value(f"{what}: time before the first step, when the cache is filled", filled[0], "s")]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = plain_parser(__doc__)
    p.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="NAME", help="files of configs/cub")
    p.add_argument("--root", required=True, help="folder of CUB-200-2011")
    p.add_argument("--vit", default="timm", help="weights of the vision transformer: timm or a file")
    p.add_argument("--pairs", type=int, default=3, help="pairs of trainings, on images and on features")
    p.add_argument("--more", nargs="*", default=[], help="more overrides of all configs, key=value")
    args = p.parse_args(argv)
    if args.pairs < 1:
        p.error("--pairs must be at least 1")
    configs = " ".join(args.configs)
    args.command = f"python -m benchmarks.feature_epochs --configs {configs} --root FOLDER --pairs {args.pairs}"
    torch.set_num_threads(args.threads)
    quiet()
    try:
        rows = [row for name in args.configs for row in of_config(name, args)]
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    return write("feature_epochs", args, "training and validation images of the configs", rows)


def of_config(name: str, args: argparse.Namespace) -> list[Row]:
    """The rows of a file of configs/cub."""
    weights = [f"model.weights={args.vit}"] if "dinov2" in name else []
    words = [f"data.dataset.root={args.root}", f"seed={args.seed}", *weights, *args.more]
    config: TrainConfig = configured(TrainConfig, Path("configs/cub") / f"{name}.yaml", words)
    copies = config.feature_copies
    resolved = as_dict(resolve(replace(config, feature_cache=None, feature_copies=0)))
    if not phases_on_features(build_model(resolved, 2, trained=True)):
        raise InputError(f"{name}: its first phase trains the trunk, so that it cannot read stored features")
    return compared(name, resolved, copies, args.pairs)


if __name__ == "__main__":
    print(show(main()))
