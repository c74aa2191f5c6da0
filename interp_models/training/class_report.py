"""What the test of a training says of each class."""

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
"""Classes of a confusion matrix that is drawn; a larger picture would take gigabytes."""


class ClassReport(pl.Callback):
    """Adds to a test the mean of the classes' accuracies and, of more than five classes, the top-5 accuracy; writes
    `classes.csv` and `confusion.png`, which goes to the loggers too.

    Args:
        num_classes: K.
        run: the run folder; None on ranks that write nothing.
    """

    def __init__(self, num_classes: int, run: Path | None) -> None:
        self.run = run
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.top = MulticlassAccuracy(num_classes, top_k=TOP, average="micro") if num_classes > TOP else None
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
        """Test images of all ranks by class (rows) and predicted class (columns)."""

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin to count."""
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
        """Count a batch."""
        assert isinstance(outputs, InterpOutput)
        for metric in filter(None, (self.confusion, self.top)):
            metric.update(outputs.logits, batch.label)

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log `test/acc_class_mean`, over the classes that have test images, and `test/acc_top5`."""
        self.counts = self.confusion.compute().cpu()
        n = self.counts.sum(dim=1)
        accuracies = self.counts.diag()[n > 0] / n[n > 0]
        module.log("test/acc_class_mean", accuracies.mean())
        if self.top is not None:
            module.log(f"test/acc_top{TOP}", self.top.compute())

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write, on rank 0."""
        if self.run is None:
            return
        classes = data_of(trainer).classes
        write_whole(self.run / "classes.csv", class_table(self.counts, classes))
        if len(classes) <= MOST_DRAWN:
            draw_confusion(self.counts, classes, self.run / "confusion.png")
            log_pictures(trainer.loggers, "confusion", [self.run / "confusion.png"])


def class_table(counts: Tensor, classes: list[str]) -> str:
    """A table in csv with a row per class: its images, how many of them are right, their share, and the class that
    most of the others are taken for (the first of several), with their number.

    Args:
        counts: images by class (rows) and predicted class (columns), int64 (K, K).
        classes: their names.

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
