"""Maps from the attention of vision transformers of timm."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.maps import full_precision
from interp_models.core.scoring import Target, logits_of, per_image, resolve_target
from interp_models.explainers.base import EXPLAINERS, Explainer, target_scores
from interp_models.nn.attention import attentions, class_rows, on_grid, patch_size, transformer, weights

MOST = 2**30
"""Bytes of attention and its gradients that are held at once, but for a single image's."""


@EXPLAINERS.register("cls_attention")
class CLSAttention(Explainer):
    """mean_h softmax(q_cls Kᵀ / √d) of the last block, at the patches (tutorial, equation 10): it knows of no class.

    With `head` and `mass` it is the display of DINO (Caron et al., ICCV 2021, figure 3: heads apart, 0.6).

    Args:
        model: a vision transformer of timm with a class token, or a module that holds one.
        head: this head alone, counted from 0.
        mass: the highest values that together are this share of the map's sum stay, the others become 0.
    """

    needs = ("attention",)
    uses_class = False

    def __init__(self, model: nn.Module, *, head: int | None = None, mass: float | None = None) -> None:
        super().__init__(model)
        if mass is not None and not 0 < mass <= 1:
            raise InputError(f"cls_attention: mass must be above 0 and at most 1; got {mass}")
        self.head, self.mass = head, mass

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        vit = transformer(self.model)
        with class_rows(attentions(vit)[-1]) as rows:
            resolve_target(target, logits_of(self.model(inputs)))  # which refuses a class that does not exist
        _once(rows, 1)
        heads = on_grid(vit, rows[0].float(), (inputs.shape[2], inputs.shape[3]))
        if self.head is not None and not 0 <= self.head < heads.shape[1]:
            raise InputError(f"cls_attention: there is no head {self.head}; there are heads 0 to {heads.shape[1] - 1}")
        maps = heads.mean(dim=1) if self.head is None else heads[:, self.head]
        return maps if self.mass is None else highest(maps, self.mass)


def _once(found: list[Tensor], layers: int) -> None:
    """Refuse a model that passes its transformer twice, as for an image and its mirror image."""
    if len(found) != layers:
        raise NotApplicable(f"the transformer was passed {len(found) / layers:g} times for one decision, not once")


def highest(maps: Tensor, mass: float) -> Tensor:
    """Maps (B, h, w), not below 0, of which only the highest values stay that together are this share of the sum.

    >>> highest(torch.tensor([[[0.1, 0.4], [0.3, 0.2]]]), 0.6).tolist()
    [[[0.0, 0.4000000059604645], [0.30000001192092896, 0.0]]]
    """
    flat, order = maps.flatten(1).sort(dim=1, descending=True, stable=True)
    before = flat.cumsum(dim=1) - flat  # what is higher
    kept = torch.where(before < mass * flat.sum(dim=1, keepdim=True), flat, 0.0)
    return torch.zeros_like(kept).scatter(1, order, kept).view_as(maps)


class _OfAttention(Explainer, ABC):
    """Abstract: a value of each token, from the attention of blocks."""

    needs = ("attention",)

    gradients = True
    blocks = slice(None)
    """The blocks that are read."""

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        vit, size = transformer(self.model), (inputs.shape[2], inputs.shape[3])
        side = patch_size(vit)
        tokens = vit.num_prefix_tokens + -(-size[0] // side[0]) * -(-size[1] // side[1])
        layers = attentions(vit)[self.blocks]
        heads = sum(layer.num_heads for layer in layers)
        few = max(1, MOST // (4 * (1 + self.gradients) * heads * tokens**2))  # all of it is held, and grows with T²
        if len(inputs) > few:
            targets = None if target is None else per_image(target, len(inputs))
            parts = [slice(first, first + few) for first in range(0, len(inputs), few)]
            return torch.cat([self._attribute(inputs[p], None if targets is None else targets[p]) for p in parts])
        with torch.set_grad_enabled(self.gradients), weights(layers) as a:
            score = target_scores(self.model(inputs), self.score, target).sum()
        _once(a, len(layers))
        found: Sequence[Tensor | None] = [None]
        if self.gradients and score.requires_grad:
            found = torch.autograd.grad(score, a, allow_unused=True)
        if self.gradients and found[0] is None:
            raise NotApplicable("no gradient path from the score back to the attention")
        pairs = zip(a, found, strict=True) if self.gradients else ()
        g = [torch.zeros_like(x) if y is None else y.float() for x, y in pairs]
        with full_precision(inputs), torch.no_grad():
            values = self._combine([x.detach().float() for x in a], g)
        return on_grid(vit, values, size)

    @abstractmethod
    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        """A and ∂y/∂A (B, heads, T, T) of the blocks -> (B, T)."""


@EXPLAINERS.register("rollout")
class Rollout(_OfAttention):
    """Row of the class token in Â_L ... Â_1 with Â = (mean_h A + I), its rows divided by their sums (Abnar and Zuidema,
    ACL 2020, section 3): it knows of no class.

    Args:
        model: a vision transformer of timm with a class token, or a module that holds one.
    """

    uses_class = False

    gradients = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        row: Tensor | None = None
        for layer in reversed(a):
            mixed = layer.mean(dim=1) + torch.eye(layer.shape[-1], device=layer.device)
            mixed = mixed / mixed.sum(dim=-1, keepdim=True)
            row = mixed[:, :1] if row is None else row @ mixed
        assert row is not None
        return row[:, 0]


@EXPLAINERS.register("attention_gradcam")
class AttentionGradCAM(_OfAttention):
    """ReLU(mean_h w_h A_h[cls]) of the last block, with w_h the mean over tokens but the class token's of ∂y/∂A_h[cls]
    (Chefer et al., CVPR 2021, the baseline of section 4).

    Args:
        model: a vision transformer of timm with a class token, or a module that holds one.
        score: what is explained.
    """

    blocks = slice(-1, None)

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        weight = g[-1][:, :, 0, 1:].mean(dim=2, keepdim=True)
        return (weight * a[-1][:, :, 0]).mean(dim=1).relu()


@EXPLAINERS.register("gradsam")
class GradSAM(_OfAttention):
    """mean over blocks, heads and rows of A ⊙ ReLU(∂y/∂A) (Barkan et al., CIKM 2021, section 3).

    Args:
        model: a vision transformer of timm with a class token, or a module that holds one.
        score: what is explained.
    """

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        return torch.stack([(x * y.relu()).mean(dim=(1, 2)) for x, y in zip(a, g, strict=True)]).mean(dim=0)


@EXPLAINERS.register("chefer")
class Chefer(_OfAttention):
    """Row of the class token in R, with R = I and, from the first block to the last, R ← R + Ā R, where
    Ā = mean_h ReLU(∂y/∂A ⊙ A): relevance by gradients alone (Chefer et al., ICCV 2021, equations 5 and 6).

    Not the tutorial's reference 27, which is the same authors' propagation of relevance through every layer (CVPR
    2021); they recommend this one in its place.

    Args:
        model: a vision transformer of timm with a class token, or a module that holds one.
        score: what is explained.
    """

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        # The row e of the class token from the left: e (I + Ā_L) ... (I + Ā_1), without any product of matrices.
        row = torch.zeros(len(a[0]), 1, a[0].shape[-1], device=a[0].device)
        row[:, :, 0] = 1.0
        for x, y in zip(reversed(a), reversed(g), strict=True):
            row = row + row @ (x * y).relu().mean(dim=1)
        return row[:, 0]
