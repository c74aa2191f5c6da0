"""Judge the prototypes of a model on all test images, and draw the nearest patches of each."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from tqdm import tqdm

from interp_models.core.files import whole, write_json
from interp_models.core.modes import evaluating, full_float32
from interp_models.core.truth import WORDS
from interp_models.data.base import truth_of
from interp_models.data.contents import together
from interp_models.data.module import DataModule, data_of
from interp_models.evaluation.cache import METHOD_VERSION
from interp_models.evaluation.tables import read_prototypes
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS, Found, PrototypeMetric
from interp_models.prototypes.search import nearest_patches
from interp_models.prototypes.sources import Prototypical
from interp_models.report.gallery import draw_nearest, of_these_images
from interp_models.training.loggers import log_pictures

TRAIN_NEIGHBOURS, TEST_NEIGHBOURS = 6, 5
"""Number of nearest images to draw; the first training image is the source of the prototype."""
SPLITS = {"test": "whole_test", "train": "train"}
"""The split of the data module for each value of `PrototypeMetric.split`."""


class PrototypeEvaluation(pl.Callback):
    """Judges the prototypes of a model by metrics after the test, and draws the nearest images of each prototype.

    It logs `test/<key>` and writes `prototypes.json` (means), `prototypes.parquet` (a row per prototype) and
    `prototypes/<sheet>/<number>.jpg`. It does nothing for models without prototypes, or if the folder already holds
    these results.

    Args:
        names: names of registered prototype metrics; if empty, nothing is judged or drawn.
        folder: folder of the results.
        work: digest of the weights and the transform; a digest of the images is added to it.

    Raises:
        InputError: for an unknown metric.
    """

    def __init__(self, names: Sequence[str], folder: Path, work: str) -> None:
        self.metrics = {name: PROTOTYPE_METRICS.get(name) for name in names}
        self.folder, self.work = folder, f"{METHOD_VERSION} {work} {' '.join(names)}"

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Judge on all ranks, and write on rank 0."""
        if not isinstance(module, Prototypical):
            return
        model: Any = module
        data, work = data_of(trainer), ""
        if trainer.is_global_zero and self.metrics:
            contents = [*data.contents("train"), *data.contents("whole_test")]
            work = f"{self.work} {together(contents)}"
        done = work != "" and read_prototypes(self.folder).get("work") == work
        if trainer.strategy.broadcast(done):
            return
        if trainer.is_global_zero:  # remove outdated results
            for name in ("prototypes.json", "prototypes.parquet"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "prototypes", ignore_errors=True)
        if not self.metrics:
            return
        with torch.inference_mode(False), torch.no_grad(), evaluating(module), full_float32():
            metrics = self._judge(model, data, trainer.is_global_zero)
            values = {key: value for metric in metrics for key, value in metric.of_all_ranks().items()}
            for key, value in values.items():
                module.log(f"test/{key}", value.float().nanmean(), sync_dist=True)
            train, test = (
                nearest_patches(model.features, images, model.vectors, k=k, cosine=model.cosine)
                for images, k in (
                    (_watched(data, "train", trainer.is_global_zero), TRAIN_NEIGHBOURS),
                    (_watched(data, "whole_test", trainer.is_global_zero), TEST_NEIGHBOURS),
                )
            )
            if trainer.is_global_zero:
                sheets = model.prototype_sheets(data.classes)
                paths = draw_nearest(train, test, model.similarity, sheets, data, self.folder / "prototypes")
                log_pictures(trainer.loggers, "prototypes/nearest", paths)
                self._write(model, data, work, {key: value.double().cpu() for key, value in values.items()}, metrics)
        trainer.strategy.barrier()

    def _judge(self, module: Prototypical, data: DataModule, shown: bool) -> list[PrototypeMetric]:
        names = data.test_images.part_names
        sample = data.dataset("test")[0, 0]  # the same on every rank
        missing = {"parts": sample.parts is None or not names, "mask": sample.masks is None}
        lacking = {name: [need for need in cls.needs if missing[need]] for name, cls in self.metrics.items()}
        metrics = [cls(module, names) for name, cls in self.metrics.items() if not lacking[name]]
        if left := [f"{name} needs {WORDS[needs[0]]}" for name, needs in lacking.items() if needs]:
            rank_zero_warn(f"left out, as the data set has no such ground truth: {'; '.join(left)}")
        device = module.prototypes.device
        for split, name in SPLITS.items():
            looking = [metric.to(device) for metric in metrics if metric.split == split]
            if not looking:
                continue
            for batch in _watched(data, name, shown):
                images, label, number = (x.to(device) for x in (batch.image, batch.label, batch.index))
                truth = truth_of(batch, batch.label).checked(images)
                found = Found(images, module(images).maps, label, number, truth.parts, truth.visible, truth.mask)
                for metric in looking:
                    metric.update(module, found)
        return metrics

    def _write(
        self,
        module: Prototypical,
        data: DataModule,
        work: str,
        values: dict[str, Any],
        metrics: Sequence[PrototypeMetric],
    ) -> None:
        """Write the table and, as the last file, `prototypes.json`: where it exists, the results are complete."""
        classes = module.prototype_classes.cpu()
        sources = module.sources.image.tolist() if of_these_images(module.sources, data) else [-1] * len(classes)
        table = pd.DataFrame(
            {
                "prototype": range(len(classes)),
                "classes": [", ".join(data.classes[int(k)] for k in row.nonzero()[:, 0]) for row in classes],
                "source": [data.train_images.image_id(image) if image >= 0 else "" for image in sources],
                **{key: value.numpy() for key, value in values.items()},
            }
        )
        with whole(self.folder / "prototypes.parquet") as path:
            table.to_parquet(path)
        rows = []
        for metric in metrics:
            for key in metric.keys:
                mean = float(values[key].nanmean())
                rows.append(
                    {
                        "metric": key,
                        "mean": None if math.isnan(mean) else mean,
                        "n": int((~values[key].isnan()).sum()),
                        "higher_is_better": metric.higher_is_better_by_key[key],
                        "percent": metric.percent,
                        "legend": metric.legend[key],
                    }
                )
        write_json(self.folder / "prototypes.json", {"work": work, "rows": rows})


def _watched(data: DataModule, split: str, shown: bool) -> Any:
    """The batches of a split for this rank, without augmentation and with a progress bar."""
    loader = data.loader(split, augment=False)
    return tqdm(loader, desc=f"prototypes, {split}", unit="batch", leave=False, disable=not shown)
