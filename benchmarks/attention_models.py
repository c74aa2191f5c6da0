"""Time of heads of attention models, of the class token's attention, and of DP-Net's epochs on stored features.

Heads of BR-NPA, DP-Net, WS-DAN and CAL ÷ the backbone's training step, as in `bap`. A ViT-S/16 with its class token's
attention ÷ without. An epoch of DP-Net on stored features ÷ an epoch on images: the training steps and the validation
of one epoch by Lightning, as `train.py` runs them. On images the frozen backbone runs without gradients.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from torch import Tensor

from benchmarks.bap import timing
from benchmarks.harness import CLOCKS, Bench, Row, Timing, load_images, parse, parser, summary, write
from benchmarks.tables import show
from interp_models.models.br_npa import BRNPA
from interp_models.models.cal import CAL
from interp_models.models.dpnet import DPNet
from interp_models.models.wsdan import WSDAN
from interp_models.nn.attention import attentions, class_rows
from interp_models.runs.building import build_data, build_model
from interp_models.training.feature_cache import FeatureCache
from interp_models.training.schedule import PhaseSchedule
from interp_models.training.trainer import quiet

EIGHT: dict[str, Any] = {"n_maps": 8, "crop_drop": False}


def heads(images: Tensor, classes: int, args: Any) -> list[Row]:
    """Every head at the network's own stride; BR-NPA also at a stride of 8."""
    rows: list[Row] = []
    for what, cls, options in (
        ("BR-NPA", BRNPA, {}),
        ("BR-NPA, stride 8", BRNPA, {"output_stride": 8}),
        ("DP-Net, all constraints", DPNet, {"complementary": 1.0, "covering": 0.1, "specific": 0.1}),
        ("B-CNN, normalised, centres, 8 maps", WSDAN, EIGHT),
        ("B-CNN, counterfactual too", CAL, EIGHT),
    ):
        model = cls(classes, weights="bundled", **options)
        rows += timing(what, model, images, args.pairs, args.seconds, args.clock)
    return rows


def capture(images: Tensor, args: Any) -> Timing:
    """A pass of a ViT-S/16 that records the class token's attention ÷ a pass that does not."""
    size = (images.shape[2], images.shape[3])
    vit: Any = timm.create_model("vit_small_patch16_224", img_size=size).eval()

    def captured() -> None:
        with torch.no_grad(), class_rows(attentions(vit)[-1]):
            for part in images.split(bench.batch):
                vit(part)

    bench = Bench(vit, images, args.pairs, args.seconds, CLOCKS[args.clock], (4, 8, 16))
    return bench.compare("ViT-S/16 with the class token's attention", "passes without", captured)


class EpochTimes(pl.Callback):
    """Seconds of every epoch, from its first step to the end of its validation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self.start)


def epochs(dataset: dict[str, Any], size: int, workers: int, cache: Path | None, count: int) -> list[float]:
    """Seconds of the epochs of a DP-Net on a frozen backbone, on images or on stored features."""
    phase = {"epochs": count, "lrs": {"parts": 1e-2, "head": 1e-2}, "eval_modules": ["backbone"]}
    options = {"complementary": 1.0, "covering": 0.1, "specific": 0.1, "weights": "bundled"}
    data_options = {"dataset": dataset, "image_size": size, "batch_size": 64, "augment": False, "num_workers": workers}
    config = {"seed": 0, "data": data_options, "model": {"name": "dpnet", **options}, "phases": [phase]}
    config["optimizer"] = {"name": "adamw", "weight_decay": 0.0}
    data = build_data(config)
    model = build_model(config, len(data.classes))
    times = EpochTimes()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=count, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[*([] if cache is None else [FeatureCache(cache)]), times, PhaseSchedule()],
    )  # fmt: skip
    trainer.fit(model, data)
    return times.seconds


def of_features(dataset: dict[str, Any], args: Any) -> Timing:
    """Epochs on features ÷ epochs on images, one pair of trainings after the other, without their first epochs."""
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.epoch_pairs):
            on_images = epochs(dataset, args.size, args.workers, None, 2)[1]
            on_features = sorted(epochs(dataset, args.size, args.workers, Path(folder), 8)[1:])
            pairs.append((on_features[len(on_features) // 2], on_images))
    return Timing("DP-Net's epoch on stored features", "its epoch on images", None, None, summary(pairs), 1, pairs)


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results."""
    p = parser(__doc__)
    p.add_argument("--classes", type=int, default=200, help="classes of the heads")
    p.add_argument("--cub", help="folder of CUB-200-2011 for the epochs; default: drawn birds")
    p.add_argument("--workers", type=int, default=0, help="processes that load images")
    p.add_argument("--epoch-pairs", type=int, default=3, help="pairs of trainings, on images and on features")
    p.set_defaults(count=16)
    args = parse(p, "attention_models", argv)
    quiet()
    images, described = load_images(args)
    rows = heads(images, args.classes, args)
    rows.append(capture(images, args))
    drawn = {"name": "part_birds", "image_size": args.size, "train_per_class": 8}
    rows.append(of_features({"name": "cub", "root": args.cub} if args.cub else drawn, args))
    return write("attention_models", args, described, rows)


if __name__ == "__main__":
    print(show(main()))
