"""Results of the test by class: accuracies and confusion matrix."""

import csv
import io
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from interp_models.core.files import write_whole
from interp_models.core.outputs import InterpOutput
from interp_models.data.base import Sample
from interp_models.data.module import data_of
from interp_models.report.confusion import draw_confusion
from interp_models.training.loggers import log_pictures

TOP = 5
MOST_DRAWN = 1000
"""Confusion matrices of more classes are not drawn: the picture would take gigabytes of memory."""


class ClassReport(pl.Callback):
    """Logs class-mean and top-5 accuracy of the test, and writes `classes.csv` and `confusion.png`.

    Top-5 accuracy needs more than five classes. The confusion matrix is also sent to the loggers.

    Args:
        num_classes: number of classes K.
        run: the run folder; None on ranks that do not write.
    """

    def __init__(self, num_classes: int, run: Path | None) -> None:
        self.run = run
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=-1)  # -1: unknown
        self.top: MulticlassAccuracy | None = None
        if num_classes > TOP:
            self.top = MulticlassAccuracy(num_classes, top_k=TOP, average="micro", ignore_index=-1)
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
        """(K, K): number of test images of all ranks by class (rows) and predicted class (columns)."""

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set all counts to 0."""
        for metric in filter(None, (self.confusion, self.top)):
            metric.to(module.device).reset()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Sample,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count the predictions of a batch."""
        assert isinstance(outputs, InterpOutput)
        for metric in filter(None, (self.confusion, self.top)):
            metric.update(outputs.logits, batch.label)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log `test/acc_class_mean`, the mean over the classes that have test images, and `test/acc_top5`, if an image
        has a label."""
        self.counts = self.confusion.compute().cpu()
        n = self.counts.sum(dim=1)
        if not n.any():
            return
        accuracies = self.counts.diag()[n > 0] / n[n > 0]
        module.log("test/acc_class_mean", accuracies.mean())
        if self.top is not None:
            module.log(f"test/acc_top{TOP}", self.top.compute())

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the files on rank 0."""
        if self.run is None:
            return
        classes = data_of(trainer).classes
        write_whole(self.run / "classes.csv", class_table(self.counts, classes))
        if len(classes) <= MOST_DRAWN:
            draw_confusion(self.counts, classes, self.run / "confusion.png")
            log_pictures(trainer.loggers, "confusion", [self.run / "confusion.png"])


def class_table(counts: Tensor, classes: list[str]) -> str:
    """A table of results by class, in csv.

    Columns: class, number of images, number of correct predictions, accuracy, the most frequent wrong prediction (the
    first of several) and how often it occurs.

    Args:
        counts: number of images by class (rows) and predicted class (columns), int64 (K, K).
        classes: names of the classes.

    >>> print(class_table(torch.tensor([[1, 2], [0, 0]]), ["a", "b"]), end="")
    class,n,right,accuracy,most_confused_with,times
    a,3,1,0.3333,b,2
    b,0,0,,,0
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "n", "right", "accuracy", "most_confused_with", "times"])
    for label, (name, row) in enumerate(zip(classes, counts.tolist(), strict=True)):
        n, right = sum(row), row[label]
        row[label] = 0
        times = max(row)
        other = classes[row.index(times)] if times else ""
        writer.writerow([name, n, right, round(right / n, 4) if n else "", other, times])
    return text.getvalue().encode(errors="backslashreplace").decode()
