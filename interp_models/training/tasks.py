"""The two tasks of a classifier: what its loss is, and by what number its epochs are compared."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.utilities import dim_zero_cat

Task = Literal["classes", "labels"]
"""`classes`: every image has one of K exclusive classes, read by a softmax. `labels`: every image has any number of K
independent labels, each read by a sigmoid."""


class Measure(NamedTuple):
    """The number that tells how good a model is, in [0, 1]."""

    key: str
    """It is logged as `val/<key>` and `test/<key>`; the epoch with the highest `val/<key>` is selected."""
    name: str


MEASURES: dict[Task, Measure] = {
    "classes": Measure("acc", "accuracy"),
    "labels": Measure("mean_ap", "mean average precision"),
}


def cross_entropy(task: Task, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of a task.

    For `labels` it is the binary cross-entropy of the sigmoids, averaged over images and classes. Label smoothing ε
    makes the targets y (1 - ε) + ε / 2, as the softmax of two classes has it.

    Args:
        task: the task.
        logits: (B, K).
        targets: for `classes` int64 (B,), for `labels` bool (B, K).
        label_smoothing: ε, in [0, 1).

    >>> cross_entropy("labels", torch.zeros(1, 3), torch.tensor([[True, False, True]])).item()  # ln 2
    0.6931471824645996
    """
    if task == "classes":
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    wanted = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, wanted)


def measure_of(task: Task, num_classes: int) -> Metric:
    """The torchmetrics `Metric` of a task's `Measure`; `update` takes logits and targets as `cross_entropy`.

    Of the task `classes`, images with the label -1, which means unknown, do not count.
    """
    if task == "labels":
        return MeanAveragePrecision()
    return MulticlassAccuracy(num_classes, average="micro", ignore_index=-1)


class MeanAveragePrecision(Metric):
    """The mean over the classes that occur of their average precision, see `average_precision`.

    It reads logits as they are: average precision depends on their order only. torchmetrics' own metric takes a sigmoid
    of those batches alone whose logits leave [0, 1], and rounds large logits to one value. NaN if no class occurs, or
    if a logit is NaN.
    """

    logits: list[Tensor]
    targets: list[Tensor]
    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (B, K).
            targets: bool (B, K).
        """
        self.logits.append(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)))
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """The mean over the classes that occur."""
        logits: Tensor = dim_zero_cat(self.logits)
        if bool(logits.isnan().any()):
            return logits.new_tensor(torch.nan)
        return average_precision(logits, dim_zero_cat(self.targets)).nanmean()


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class: Σ_n (R_n - R_{n-1}) P_n over the distinct scores of the class, from the highest.

    P_n and R_n are precision and recall of "the class is present" for the images whose score is at least the n-th. So
    images of equal score come together, and their order does not matter.

    Args:
        scores: (N, K); larger means more likely.
        targets: bool (N, K).

    Returns:
        (K,) float64; NaN for a class that no image has.

    >>> average_precision(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[True], [False], [True]]))
    tensor([0.8333], dtype=torch.float64)
    """
    found = []
    for own, present in zip(scores.T, targets.T, strict=True):
        order = own.argsort(descending=True)
        own, right = own[order], present[order].double().cumsum(0)
        last = torch.ones_like(own, dtype=torch.bool)  # of the images of one score
        last[:-1] = own[:-1] != own[1:]
        count = torch.arange(1, len(own) + 1, device=own.device)
        precision, recall = (right / count)[last], (right / right[-1])[last]
        found.append((precision * recall.diff(prepend=recall.new_zeros(1))).sum())
    return torch.stack(found)
