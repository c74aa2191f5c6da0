"""The order of the images in an epoch, and how often each occurs."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from interp_models.core.rng import uniform
from interp_models.data.subsets import Indices

AGAIN = 2**32
"""Added to the epoch for each repetition of an image within the epoch, so that it gets another augmentation."""


class ShardSampler(Sampler[tuple[int, int]]):
    """Samples this rank's positions of an epoch, as `(epoch, position)`.

    In training (with `global_batch`) the order is a permutation that depends on seed and epoch. An incomplete last
    batch is dropped, unless it is the only one. So all ranks make the same number of steps, no image occurs twice, and
    two ranks see the same images as one rank with twice the batch size. In evaluation the order is that of the data,
    and every image occurs exactly once.

    Args:
        size: number of images.
        rank: rank of this process.
        world: number of ranks.
        seed: seed of the order.
        global_batch: images per step on all ranks, in training; None in evaluation.
        labels: class of each image, for an epoch with balanced classes; see `balanced`.
    """

    def __init__(
        self,
        size: int,
        *,
        rank: int,
        world: int,
        seed: int = 0,
        global_batch: int | None = None,
        labels: Indices | None = None,
    ) -> None:
        self.size, self.rank, self.world, self.seed, self.global_batch = size, rank, world, seed, global_batch
        self.labels = labels
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls it at the start of each epoch."""
        self.epoch = epoch

    @property
    def _total(self) -> int:
        """Number of positions of all ranks."""
        if self.global_batch is None:
            return self.size
        return self.size // self.global_batch * self.global_batch or -(-self.size // self.world) * self.world

    def __len__(self) -> int:
        return len(range(self.rank, self._total, self.world))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        positions, rounds = np.arange(self.size), np.zeros(self.size, dtype=np.int64)
        if self.labels is not None:
            positions, rounds = balanced(self.labels, self.seed, self.epoch)
        if self.global_batch is not None:
            order = np.argsort(uniform(self.seed, self.epoch, np.arange(self.size)), kind="stable")
            positions, rounds = positions[order], rounds[order]
        for slot in np.resize(np.arange(self.size), self._total)[self.rank :: self.world]:
            yield self.epoch + AGAIN * int(rounds[slot]), int(positions[slot])


def balanced(labels: Indices, seed: int, epoch: int) -> tuple[Indices, Indices]:
    """Draw a class-balanced epoch of N positions, where N is the number of labels.

    Every class occurs equally often; if N is not a multiple of the number of classes, some drawn classes occur once
    more. An image is repeated only after all other images of its class have occurred.

    Args:
        labels: class of each image, (N,).
        seed: seed of the draw.
        epoch: epoch of the draw.

    Returns:
        Positions sorted by class, and for each the number of its earlier occurrences in this epoch; both int64 (N,).
    """
    classes = np.unique(labels)
    drawn = np.argsort(uniform(seed, epoch, -1 - classes), kind="stable")
    share = np.full(len(classes), len(labels) // len(classes))
    share[drawn[: len(labels) % len(classes)]] += 1
    positions, rounds = [], []
    for label, count in zip(classes, share, strict=True):
        members = np.flatnonzero(labels == label)
        turn = np.arange(-(-count // len(members)))[:, None]
        order = np.argsort(
            uniform(seed, epoch, members, turn), axis=1, kind="stable"
        )  # a new order for each repetition
        positions.append(members[order].ravel()[:count])
        rounds.append(np.broadcast_to(turn, order.shape).ravel()[:count])
    return np.concatenate(positions), np.concatenate(rounds)
