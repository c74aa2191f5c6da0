"""The order of the images of an epoch, and how often each is seen."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from interp_models.core.rng import uniform
from interp_models.data.subsets import Indices

AGAIN = 2**32
"""Offset of the epoch for an image that is repeated within it, so that it gets another augmentation."""


class ShardSampler(Sampler[tuple[int, int]]):
    """This rank's positions of an epoch as `(epoch, position)`.

    In training (`global_batch` is given) the order is a permutation by seed and epoch, and the last incomplete batch
    over all ranks is dropped unless it is the only one: ranks must step together, no image counts twice, and two
    ranks see what one sees with twice the batch. In evaluation the order is that of the data and nothing is dropped
    or repeated, so that n equals the data set. With `labels` every class comes equally often in training, see
    `balanced`.
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
        """Called by Lightning when an epoch begins."""
        self.epoch = epoch

    @property
    def _total(self) -> int:
        """Positions of all ranks together."""
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
    """Positions of a class-balanced epoch: as many as labels, equally many per class, or one more by draw.

    No image comes again before all others of its class have come. Drawn by seed and epoch.

    Returns:
        Positions by class, and of each how often it has come before in this epoch, both int64 (N,).
    """
    classes = np.unique(labels)
    drawn = np.argsort(uniform(seed, epoch, -1 - classes), kind="stable")
    share = np.full(len(classes), len(labels) // len(classes))
    share[drawn[: len(labels) % len(classes)]] += 1
    positions, rounds = [], []
    for label, count in zip(classes, share, strict=True):
        members = np.flatnonzero(labels == label)
        turn = np.arange(-(-count // len(members)))[:, None]
        order = np.argsort(uniform(seed, epoch, members, turn), axis=1, kind="stable")  # another order in every turn
        positions.append(members[order].ravel()[:count])
        rounds.append(np.broadcast_to(turn, order.shape).ravel()[:count])
    return np.concatenate(positions), np.concatenate(rounds)
