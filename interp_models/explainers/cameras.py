"""CAMERAS: feature maps and gradients of several resolutions of the image, fused before they are multiplied."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.batches import default_batch
from interp_models.core.errors import InputError, NotApplicable, first_line
from interp_models.core.maps import full_precision
from interp_models.core.prepared import class_name
from interp_models.core.scoring import Score, Target, logits_of
from interp_models.explainers.base import EXPLAINERS, target_scores
from interp_models.explainers.combinators import resolved
from interp_models.explainers.features import activations_and_gradients, shared_passes
from interp_models.explainers.layers import Layer
from interp_models.explainers.of_layer import OfLayer
from interp_models.nn.attention import find_transformer, patch_size

VALUES = 2**22
"""Values of enlarged feature maps in memory at once (16 MiB of float32)."""


@EXPLAINERS.register("cameras")
@dataclass(kw_only=True, eq=False, repr=False)
class CAMERAS(OfLayer):
    """CAMERAS = ReLU(Σ_k mean_r up(A_rk) ⊙ mean_r up(g_rk)) over several resolutions r of the image (Jalwana et al.,
    CVPR 2021).

    A_r are the layer's feature maps for the image at resolution r (bicubic), y is the target's score, g_r = ∂y/∂A_r,
    and up enlarges bilinearly to the image's own resolution, which is that of the map. Resolutions grow linearly, from
    the image's own to `largest` times its sides. Those at which the model predicts another class than at the image's
    own are left out. Images and channels are processed a few at a time. A pass of a larger image takes longer: with the
    defaults, the images of all passes together have 61 times the area of the image itself.

    Raises:
        NotApplicable: if the network takes images of one size only.
    """

    needs = ("any_size",)
    amplifies_rounding = True
    passes = "resolutions"
    small: ClassVar[Mapping[str, Any]] = {"resolutions": 2, "largest": 1.5}

    resolutions: int = 8
    """Number of resolutions."""
    largest: float = 4.125
    """Sides of the largest ÷ sides of the image (authors: 224, 324, ..., 924 pixels)."""
    score: Score = "logit"
    """Explain the target's `logit` or its `probability`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolutions < 1 or not self.largest >= 1:
            raise InputError(
                f"cameras: resolutions and largest must be at least 1; got {self.resolutions}, {self.largest}"
            )
        self._own_size: Tensor | None = None

    def target_layer(self, inputs: Tensor) -> Layer:
        """The layer that is found for the images' own size. Only the grid of tokens depends on the size."""
        own = super().target_layer(inputs if self._own_size is None else self._own_size)
        return own if own.form.kind in ("nchw", "nhwc") else super().target_layer(inputs)

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        targets, own = resolved(self.model, inputs, target), (inputs.shape[2], inputs.shape[3])
        kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in inputs]
        predicted: Tensor | None = None
        self._own_size = inputs
        try:
            for size in self._sizes(own):
                a, g, classes = self._at(inputs, targets, size)
                predicted = classes if predicted is None else predicted
                for i in (classes == predicted).nonzero()[:, 0].tolist():
                    kept[i][0].append(a[i])
                    kept[i][1].append(g[i])
        finally:
            self._own_size = None
        with full_precision(inputs):
            return torch.stack([self._fused(a, g, own) for a, g in kept])

    def _sizes(self, own: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each resolution, the image's own first; a transformer needs whole patches."""
        vit = find_transformer(self.model)
        units = (1, 1) if vit is None else patch_size(vit)
        factors = [1 + (self.largest - 1) * r / max(1, self.resolutions - 1) for r in range(1, self.resolutions)]
        sides = [[round(n * factor / unit) * unit for n, unit in zip(own, units, strict=True)] for factor in factors]
        return [own, *((height, width) for height, width in sides)]

    def _at(self, inputs: Tensor, targets: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """A and g (B, C, h, w) and the predicted classes (B,) for images that are resized to a size."""
        own = size == (inputs.shape[2], inputs.shape[3])
        classes: list[Tensor] = []
        found = []
        step = default_batch(inputs.new_empty(0, *size))
        for some in torch.split(torch.arange(len(inputs), device=inputs.device), step):
            images = inputs[some]
            if not own:
                images = F.interpolate(images, size=size, mode="bicubic", align_corners=False)

            def score(output: Any, some: Tensor = some) -> Tensor:
                classes.append(logits_of(output).detach().argmax(dim=1))
                return target_scores(output, self.score, targets[some])

            try:
                with shared_passes():  # of its own, so that these passes are not kept in the caller's
                    found.append(activations_and_gradients(self, images, targets[some], score))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, AssertionError, ValueError) as error:
                if own:
                    raise
                raise NotApplicable(
                    f"{class_name(self.model)} does not take images of {size[0]} × {size[1]} beside those of "
                    f"{inputs.shape[2]} × {inputs.shape[3]}, as cameras needs: {first_line(error)}"
                ) from None
        a, g = (torch.cat(parts) for parts in zip(*found, strict=True))
        return a, g, torch.cat(classes)

    def _fused(self, a: list[Tensor], g: list[Tensor], size: tuple[int, int]) -> Tensor:
        """The map (H, W) of one image from A and g (C, h, w) of its resolutions."""
        pairs = zip(_mean_enlarged(a, size), _mean_enlarged(g, size), strict=True)
        return torch.stack([(x * y).sum(dim=0) for x, y in pairs]).sum(dim=0).relu()


def _mean_enlarged(maps: list[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
    """Resize maps (C, h, w) of several grids bilinearly to `size` and average them over the grids; yields some channels
    at a time, (c, *size).

    Bilinear resizing is a product with a matrix for the columns and one for the rows. One product with the matrices of
    all grids side by side also takes the mean.
    """
    units = [[torch.eye(n, dtype=x.dtype, device=x.device)[None, None] for n in x.shape[1:]] for x in maps]
    rows, columns = (
        [
            F.interpolate(one[axis], size=(size[axis], one[axis].shape[-1]), mode="bilinear", align_corners=False)[0, 0]
            for one in units
        ]
        for axis in (0, 1)
    )
    all_rows = torch.cat(rows, dim=1) / len(maps)
    for some in torch.split(torch.arange(len(maps[0]), device=maps[0].device), max(1, VALUES // (size[0] * size[1]))):
        yield all_rows @ torch.cat([x[some] @ up.T for x, up in zip(maps, columns, strict=True)], dim=1)
