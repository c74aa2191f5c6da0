"""An ensemble: the mean of the class probabilities of several runs.

The prototype papers report such accuracies for 3 and 5 networks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_models.core.distributed import gathered_objects
from interp_models.core.errors import InputError
from interp_models.core.files import folder_of_several, write_json
from interp_models.core.outputs import InterpOutput
from interp_models.data.base import Sample
from interp_models.evaluation.evaluate import REFUSED, is_first_process
from interp_models.runs.config import EnsembleConfig
from interp_models.runs.evaluate import check_same_images, judging_of
from interp_models.training.module import InterpModule
from interp_models.training.trainer import check_trainer, make_trainer, quiet, seed_everything, tell_data


def ensemble(folders: Sequence[Path], config: EnsembleConfig) -> Path:
    """Average the class probabilities of several runs on the same test images.

    Args:
        folders: at least two run folders.
        config: checkpoint, images and output folder.

    Returns:
        The path of `metrics.json`, which holds the accuracy of the ensemble and of each run.

    Raises:
        InputError: if there are fewer than two runs, or their test images differ.
    """
    quiet()
    options, _ = check_trainer(config.trainer, REFUSED)
    if len(folders) < 2:
        raise InputError(f"an ensemble needs at least two runs; got {len(folders)}")
    judged = [judging_of(folder, config) for folder in folders]
    if len({one.name for one in judged}) < len(judged):
        raise InputError(f"two runs have the same name: {', '.join(o.name for o in judged)}")
    for one in judged:
        one.data.memory = one.results
        one.data.check_files("test")
    if any(one.data.multilabel for one in judged):
        raise InputError("an ensemble needs one class per image; the images of these runs have several labels")
    if not all(one.data.has_labels for one in judged):
        raise InputError("an ensemble needs the class of every image; the images have no labels")
    check_same_images({str(one.folder): one.data for one in judged})
    out = folder_of_several(config.out, "ensembles") if is_first_process() else None
    tell_data(*(one.data for one in judged))
    members = []
    for one in judged:
        seed_everything(config.seed)
        members.append(Predictions())
        trainer = make_trainer(
            default_root_dir=one.folder,
            logger=False,
            callbacks=members[-1:],
            use_distributed_sampler=False,
            **{"enable_progress_bar": False, **options},
        )
        assert isinstance(one.model, InterpModule)
        trainer.test(one.model, one.data, verbose=False)
    path = (out or folders[0]) / "metrics.json"
    if out is not None:
        accuracy = write_ensemble(path, [one.name for one in judged], members)
        count = len(members[0].labels)
        print(f"test accuracy {100 * accuracy:.2f} % of {len(members)} runs together on {count} images: {out}")
    return path


class Predictions(pl.Callback):
    """Collects the class probabilities of all test images; every rank has all of them in the end."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.indices: NDArray[np.int64] = np.empty(0, np.int64)
        """(n,): positions in the test split, ascending."""
        self.labels: NDArray[np.int64] = np.empty(0, np.int64)
        """(n,): class labels."""
        self.probabilities: NDArray[np.float64] = np.empty((0, 0))
        """(n, K): class probabilities."""

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the class probabilities of the batch."""
        assert isinstance(outputs, InterpOutput)
        assert isinstance(batch, Sample)
        probabilities = outputs.logits.double().softmax(dim=1)
        self._rows.append((batch.index.cpu(), batch.label.cpu(), probabilities.cpu()))

    def on_test_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Gather the probabilities of all ranks, sorted by position."""
        rows = [row for part in gathered_objects(self._rows) for row in part]
        index, label, probabilities = (torch.cat(of).numpy() for of in zip(*rows, strict=True))
        order = index.argsort()
        self.indices, self.labels, self.probabilities = index[order], label[order], probabilities[order]


def write_ensemble(path: Path, names: Sequence[str], members: Sequence[Predictions]) -> float:
    """Write the accuracy of the ensemble and of each member as json.

    Args:
        path: the json file.
        names: name of each member.
        members: probabilities of each member, for the same test images.

    Returns:
        The accuracy of the ensemble, in [0, 1]. The ensemble predicts the class of highest mean probability.
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
