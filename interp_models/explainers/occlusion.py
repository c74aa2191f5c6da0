"""Occlusion: the drop of the score when a square covers a part of the image."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interp_models.core.batches import scores_of_variants
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.maps import full_precision
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, Explainer


@EXPLAINERS.register("occlusion")
class Occlusion(Explainer):
    """Occlusion: S(p) = mean drop of the score over all squares that cover the pixel p (Zeiler and Fergus, ECCV 2014,
    section 4.2).

    The drop is y(x) - y(x with the square filled). Squares start every `stride` pixels from the upper left corner;
    those at the right and lower borders are cut off there. Each square takes one pass. Occluded images are made a few
    at a time. The map has the resolution of the input.

    Args:
        model: any module that returns logits.
        window: side of the square in pixels.
        stride: distance between squares in pixels, at most `window`.
        fill: value of the covered pixels; 0.5 is grey, as in the paper.
        score: `logit`, or `probability` as in the paper. A probability also depends on the logits of other classes.
        batch: images per forward pass; None chooses it for the device.

    Raises:
        NotApplicable: if the window covers the whole image.
    """

    passes = "windows + 1"
    amplifies_rounding = True
    small: ClassVar[Mapping[str, Any]] = {"window": 40, "stride": 24}

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 32,
        stride: int = 16,
        fill: float = 0.5,
        score: Score = "logit",
        batch: int | None = None,
    ) -> None:
        super().__init__(model, score=score)
        if not 1 <= stride <= window or (batch is not None and batch < 1):
            raise InputError(
                f"occlusion needs 1 <= stride <= window, so that squares cover every pixel, and batch >= 1; got stride "
                f"{stride}, window {window}, batch {batch}"
            )
        self.window, self.stride, self.fill, self.batch = window, stride, fill, batch

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        if self.window >= max(inputs.shape[-2:]):
            raise NotApplicable(f"occlusion: a window of {self.window} pixels hides all of {tuple(inputs.shape[-2:])}")
        score, whole, targets = self.scored(inputs, target)
        rows, columns = (self._bands(n, inputs.device) for n in inputs.shape[-2:])

        def occluded(b: Tensor, square: Tensor) -> Tensor:
            hidden = rows[square // len(columns)][:, :, None] & columns[square % len(columns)][:, None, :]
            return torch.where(hidden[:, None], self.fill, inputs[b])

        count = len(rows) * len(columns)
        scores = scores_of_variants(score, inputs, count, occluded, targets, self.batch)
        lost = whole.gather(1, targets[:, None])[:, :, None] - scores.view(len(inputs), len(rows), len(columns))
        up, across = rows.to(lost.dtype), columns.to(lost.dtype)
        with full_precision(lost):
            return (up.T @ lost @ across) / (up.sum(dim=0)[:, None] * across.sum(dim=0))

    def _bands(self, side: int, device: torch.device) -> Tensor:
        """The pixels that each of n squares covers along one axis, (n, side) bool."""
        starts = torch.arange(0, max(1, side - self.window + self.stride), self.stride, device=device)[:, None]
        pixels = torch.arange(side, device=device)
        return (pixels >= starts) & (pixels < starts + self.window)
