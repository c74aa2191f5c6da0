"""SISE and Ada-SISE: images masked by feature maps of several layers, and layers fused from low to high."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from interp_models.core.batches import default_batch
from interp_models.core.errors import InputError
from interp_models.core.maps import full_precision, stretched
from interp_models.core.scoring import Score, ScoreFn, Target
from interp_models.explainers.base import EXPLAINERS, ByFields
from interp_models.explainers.features import stage_activations
from interp_models.explainers.forms import Reshape
from interp_models.explainers.of_layer import LayerNames, check_layers


def otsu(values: Tensor) -> Tensor:
    """Otsu's threshold of values (n,): the largest value of the lower of the two classes with the highest variance
    between them, n_0 n_1 (μ_0 - μ_1)². It is exact, without a histogram. Equal values have none: it is below them.

    >>> float(otsu(torch.tensor([0.0, 5.0, 1.0, 6.0]))), float(otsu(torch.tensor([2.0, 2.0])))
    (1.0, -inf)
    """
    ordered = values.flatten().double().sort().values
    lower = torch.arange(1, len(ordered), device=values.device)
    upper, sums = len(ordered) - lower, ordered.cumsum(dim=0)
    apart = sums[:-1] / lower - (sums[-1] - sums[:-1]) / upper
    between = torch.where(ordered[1:] > ordered[:-1], lower * upper * apart.square(), -1.0)
    if not len(between) or float(between.max()) < 0:
        return ordered.new_full((), -torch.inf)
    return ordered[between.argmax()]


@dataclass(kw_only=True, eq=False, repr=False)
class _OfStages(ByFields, ABC):
    """Abstract: scores of images masked by chosen feature maps of several layers, fused.

    A subclass implements `_chosen`.
    """

    amplifies_rounding = True
    stands_bfloat16 = False
    passes = "selected + 1"

    layer: LayerNames = None
    """Dotted names of the layers, from the lowest to the highest; None takes the last feature map of every
    resolution."""
    reshape: Reshape = None
    """Form of the layers' outputs, `nchw`, `nhwc`, `tokens` or a function; None finds out."""
    score: Score = "probability"
    """Masks are weighted by the target's `probability`, as in the authors' code, or its `logit`."""
    batch: int | None = None
    """Masked images per forward pass; None chooses it for the device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layer, self.reshape)
        if self.batch is not None and self.batch < 1:
            raise InputError(f"batch must be at least 1; got {self.batch}")
        self.selected = 0.0
        """Feature maps that the last call chose per image, in all layers."""

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        maps, gradients, targets = stage_activations(
            self.model, self.layer, self.reshape, inputs, target, gradient=True
        )
        with torch.no_grad():
            score = self.score_fn(inputs)
            found, count = [], 0
            for i, c in enumerate(targets):
                fused: Tensor | None = None
                for a, g in zip(maps, gradients, strict=True):
                    constant = a[i].amin(dim=(1, 2)) == a[i].amax(dim=(1, 2))
                    chosen = self._chosen(g[i].mean(dim=(1, 2)).masked_fill(constant, -torch.inf))
                    count += int(chosen.sum())
                    seen = self._seen(score, inputs[i], a[i][chosen], c)
                    fused = seen if fused is None else (fused + seen) * (seen > otsu(seen))
                assert fused is not None
                found.append(fused)
        self.selected = count / len(inputs)
        return torch.stack(found)

    @abstractmethod
    def _chosen(self, means: Tensor) -> Tensor:
        """Which feature maps are masks, (C,) bool, from the mean gradient of each; -inf for constant ones."""

    def _seen(self, score: ScoreFn, image: Tensor, a: Tensor, c: Tensor) -> Tensor:
        """A layer's map V (H, W) in [0, 1] from its chosen feature maps (n, h, w)."""
        size = (image.shape[1], image.shape[2])
        total = a.new_zeros(size)
        for some in torch.split(a, self.batch or default_batch(image)):
            if len(some):
                masks = stretched(some, size)
                scores = score(image * masks.to(image.dtype))[:, c].to(total.dtype)
                weights = scores / masks.sum(dim=(1, 2, 3))
                with full_precision(image):
                    total += (weights[:, None, None] * masks[:, 0]).sum(dim=0)
        low, high = torch.aminmax(total)
        return (total - low) / torch.where(high > low, high - low, 1.0)


@EXPLAINERS.register("sise")
@dataclass(kw_only=True, eq=False, repr=False)
class SISE(_OfStages):
    """SISE: V_l = n(Σ_k f(x ⊙ M_k) M_k / Σ M_k) of several layers l, fused by S ← (S + V_l) ⊙ [V_l > Otsu's threshold]
    from the lowest to the highest layer (Sattarzadeh et al., AAAI 2021).

    The masks M_k are those of the layer's feature maps A_k whose mean gradient of the target's logit is above μ times
    the layer's highest, bilinearly enlarged to the image and min-max normalised (n) to [0, 1]. f is the target's score.
    The layers are the last feature maps of every resolution (see `layers.stages`): the inputs of the layers that reduce
    it. Each chosen feature map takes one pass. Masked images are made a few at a time. The map has the resolution of
    the image.
    """

    small: ClassVar[Mapping[str, Any]] = {"threshold": 0.6}

    threshold: float = 0.0
    """μ, at least 0 and below 1; 0 keeps all feature maps with a positive mean gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise InputError(f"sise: threshold must be at least 0 and below 1; got {self.threshold}")

    def _chosen(self, means: Tensor) -> Tensor:
        return (means > 0) & (means > self.threshold * means.amax())


@EXPLAINERS.register("ada_sise")
class AdaSISE(_OfStages):
    """Ada-SISE: SISE with only those feature maps whose mean gradient is above Otsu's threshold of the layer's positive
    mean gradients (Sudhakar et al., ICASSP 2021).

    See `sise`. There are fewer masks, and no threshold to choose.
    """

    def _chosen(self, means: Tensor) -> Tensor:
        positive = means > 0
        return positive & (means > otsu(means[positive])) if bool(positive.any()) else positive
