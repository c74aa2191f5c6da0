"""ProtoTree whose prototypes start elsewhere: a plugin for `python -m studies.prototype_recipes`."""

from typing import Literal

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from interp_models.core.modes import evaluating
from interp_models.data.module import data_of
from interp_models.models.prototree import ProtoTree
from interp_models.nn.backbone import BUNDLED, Weights
from interp_models.prototypes.distances import Distance, unit
from interp_models.training.module import MODELS

SAMPLE = 8000
"""Patches that the means are made of."""


@MODELS.register("prototree_started")
class StartedTree(ProtoTree):
    """ProtoTree with another start of the prototypes.

    Args:
        num_classes: number of classes K.
        backbone: see `ProtoTree`.
        weights: see `ProtoTree`.
        depth: see `ProtoTree`.
        channels: see `ProtoTree`.
        distance: see `ProtoTree`.
        start: `normal` draws from a normal distribution of mean 0, `patches` takes random patches of training images,
            and `kmeans` the means of clusters of them.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = BUNDLED,
        weights: Weights = "timm",
        depth: int = 6,
        channels: int = 256,
        distance: Distance = "l2",
        start: Literal["normal", "patches", "kmeans"] = "normal",
    ) -> None:
        super().__init__(
            num_classes, backbone=backbone, weights=weights, depth=depth, channels=channels, distance=distance
        )
        self.start = start

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Place the prototypes, before the first step."""
        if self.global_step:
            return  # resumed
        if self.start == "normal":
            self._place(torch.randn_like(self.prototypes))
            return
        loader = data_of(self.trainer).loader("train", augment=False)
        with evaluating(self):
            cells = [self.features(batch.image.to(self.device)).movedim(1, -1).flatten(0, -2).cpu() for batch in loader]
        self._place(started(torch.cat(cells), len(self.prototypes), self.start)[..., None, None].to(self.device))

    def _place(self, prototypes: Tensor) -> None:
        """Set the prototypes. With cosines they get the length of the usual ones, which a learning rate suits: a step
        turns a long vector less."""
        usual = self.prototypes.norm(dim=1).mean()
        self.prototypes.copy_(unit(prototypes) * usual if self.cosine else prototypes)


def started(patches: Tensor, count: int, start: str) -> Tensor:
    """So many random patches (count, D) of all (N, D), or the means of so many clusters."""
    draw = np.random.default_rng(0)
    some = patches[torch.from_numpy(draw.permutation(len(patches)))]
    if start == "patches":
        return some[:count]
    some = some[:SAMPLE].double()
    means, _ = kmeans2(some.numpy(), some[:count].numpy(), iter=20, minit="matrix")
    return torch.from_numpy(means).to(patches.dtype)
