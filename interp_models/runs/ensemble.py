"""The mean of the class probabilities of several runs, as the prototype papers' figures for 3 and 5 networks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_models.core.distributed import gathered_objects
from interp_models.core.files import write_json
from interp_models.core.outputs import InterpOutput
from interp_models.data.base import Sample


class Predictions(pl.Callback):
    """Keeps the class probabilities of all test images, on all ranks."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.indices: NDArray[np.int64] = np.empty(0, np.int64)
        """Positions in the test split, (n,), ascending."""
        self.labels: NDArray[np.int64] = np.empty(0, np.int64)
        self.probabilities: NDArray[np.float64] = np.empty((0, 0))
        """(n, K)."""

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's."""
        assert isinstance(outputs, InterpOutput)
        assert isinstance(batch, Sample)
        chances = outputs.logits.double().softmax(dim=1)
        self._rows.append((batch.index.cpu(), batch.label.cpu(), chances.cpu()))

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Put the ranks' together."""
        rows = [row for part in gathered_objects(self._rows) for row in part]
        index, label, chances = (torch.cat(of).numpy() for of in zip(*rows, strict=True))
        order = index.argsort()
        self.indices, self.labels, self.probabilities = index[order], label[order], chances[order]


def write_ensemble(path: Path, names: Sequence[str], members: Sequence[Predictions]) -> float:
    """Write the accuracy of the mean of the members' probabilities, and of each, as json; returns the first.

    The members are of the same test images.
    """
    labels = members[0].labels
    mean = np.mean([member.probabilities for member in members], axis=0)
    accuracy = float((mean.argmax(axis=1) == labels).mean())
    alone = {
        name: float((member.probabilities.argmax(axis=1) == labels).mean())
        for name, member in zip(names, members, strict=True)
    }
    write_json(path, {"test/acc": accuracy, "test/n": len(labels), "members": alone})
    return accuracy
