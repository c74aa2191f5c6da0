"""Explainers that read the attention of timm's vision transformers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.maps import full_precision
from interp_models.core.norms import gradients
from interp_models.core.scoring import Target, logits_of, per_image, resolve_target
from interp_models.explainers.base import EXPLAINERS, Explainer, no_path, target_scores
from interp_models.explainers.calls import Call, Kept, Table
from interp_models.explainers.class_token import check_transformer
from interp_models.explainers.layer_rules import AlphaBeta, Composite, share
from interp_models.explainers.relevance import Relevance, finite, seeded, unchanged
from interp_models.nn.attention import attentions, class_rows, on_grid, patch_size, transformer, weights

MOST = 2**30
"""Most bytes of attention and its gradients in memory at once; a single image may exceed it."""


@EXPLAINERS.register("cls_attention")
class CLSAttention(Explainer):
    """Attention of the class token to the patches in the last block, mean_h softmax(q_cls Kᵀ / √d) over heads h
    (tutorial, equation 10).

    The map is the same for every class. `head` and `mass: 0.6` give the pictures of DINO (Caron et al., ICCV 2021,
    figure 3).

    Args:
        model: a timm vision transformer with a class token, or a module that contains one.
        head: use this head only, counted from 0; None takes the mean of all heads.
        mass: keep the largest values that make up this fraction of the map's sum, and set the others to 0; None keeps
            all.
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
        check_transformer(self.model, vit, inputs)
        with class_rows(attentions(vit)[-1]) as rows:
            resolve_target(target, logits_of(self.model(inputs)))  # raises for a class that does not exist
        once(rows, 1)
        heads = on_grid(vit, rows[0].float(), (inputs.shape[2], inputs.shape[3]))
        if self.head is not None and not 0 <= self.head < heads.shape[1]:
            raise InputError(f"cls_attention: head must be from 0 to {heads.shape[1] - 1}; got {self.head}")
        maps = heads.mean(dim=1) if self.head is None else heads[:, self.head]
        return maps if self.mass is None else highest(maps, self.mass)


def once(found: list[Tensor], layers: int) -> None:
    """Refuse a model that runs its transformer more than once per image, for example also on the mirrored image."""
    if len(found) != layers:
        raise NotApplicable(f"the transformer ran {len(found) / layers:g} times for one prediction; expected once")


def highest(maps: Tensor, mass: float) -> Tensor:
    """Keep the largest values of each map (B, h, w) that make up the fraction `mass` of its sum; set the others to 0.

    Values must not be negative.

    >>> highest(torch.tensor([[[0.1, 0.4], [0.3, 0.2]]]), 0.6).tolist()
    [[[0.0, 0.4000000059604645], [0.30000001192092896, 0.0]]]
    """
    flat, order = maps.flatten(1).sort(dim=1, descending=True, stable=True)
    before = flat.cumsum(dim=1) - flat  # sum of the larger values
    kept = torch.where(before < mass * flat.sum(dim=1, keepdim=True), flat, 0.0)
    return torch.zeros_like(kept).scatter(1, order, kept).view_as(maps)


class OfAttention(Explainer, ABC):
    """Abstract: one value per token, computed from the attention of transformer blocks."""

    needs = ("attention",)

    gradients = True
    """Whether the method reads ∂y/∂A."""
    blocks = slice(None)
    """The blocks that it reads."""

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        vit, size = transformer(self.model), (inputs.shape[2], inputs.shape[3])
        check_transformer(self.model, vit, inputs)
        side = patch_size(vit)
        tokens = vit.num_prefix_tokens + -(-size[0] // side[0]) * -(-size[1] // side[1])
        layers = attentions(vit)[self.blocks]
        heads = sum(layer.num_heads for layer in layers)
        few = max(1, MOST // (4 * (1 + self.gradients) * heads * tokens**2))  # memory grows with T²
        if len(inputs) > few:
            targets = None if target is None else per_image(target, len(inputs))
            parts = [slice(first, first + few) for first in range(0, len(inputs), few)]
            return torch.cat([self._attribute(inputs[p], None if targets is None else targets[p]) for p in parts])
        a, g = self._passed(vit, layers, inputs, target)
        with full_precision(inputs), torch.no_grad():
            values = self._combine([x.detach().float() for x in a], [y.float() for y in g])
        return on_grid(vit, values, size)

    def _passed(
        self, vit: Any, layers: list[Any], inputs: Tensor, target: Target
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Attention A and g = ∂y/∂A of each block (B, heads, T, T), by one pass; g is empty without `gradients`."""
        with torch.set_grad_enabled(self.gradients), weights(layers) as a:
            score = target_scores(self.model(inputs), self.score, target).sum()
        once(a, len(layers))
        found: Sequence[Tensor | None] = [None]
        if self.gradients and score.requires_grad:
            found = gradients(score, a)
        if self.gradients and found[0] is None:
            raise no_path("the attention")
        pairs = zip(a, found, strict=True) if self.gradients else ()
        return a, [torch.zeros_like(x) if y is None else y for x, y in pairs]

    @abstractmethod
    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        """Attention A and g = ∂y/∂A of each block (B, heads, T, T) -> one value per token (B, T)."""


@EXPLAINERS.register("rollout")
class Rollout(OfAttention):
    """Attention rollout: the class token's row of Â_L ... Â_1, where Â is mean_h A + I with rows normalised to sum to 1
    (Abnar and Zuidema, ACL 2020, section 3).

    A is the attention of a block, h runs over its heads, and L is the number of blocks. The map is the same for every
    class.

    Args:
        model: a timm vision transformer with a class token, or a module that contains one.
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
class AttentionGradCAM(OfAttention):
    """Grad-CAM on the last block's attention: ReLU(mean_h w_h A_h[cls]), with w_h the mean of ∂y/∂A_h[cls] over all
    tokens except the class token (Chefer et al., CVPR 2021, the baseline of section 4).

    A_h[cls] is the class token's row of head h, and y is the target's score.

    Args:
        model: a timm vision transformer with a class token, or a module that contains one.
        score: explain the target's `logit` or its `probability`.
    """

    blocks = slice(-1, None)

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        weight = g[-1][:, :, 0, 1:].mean(dim=2, keepdim=True)
        return (weight * a[-1][:, :, 0]).mean(dim=1).relu()


@EXPLAINERS.register("gradsam")
class GradSAM(OfAttention):
    """Grad-SAM: the mean over blocks, heads and rows of A ⊙ ReLU(∂y/∂A) (Barkan et al., CIKM 2021, section 3).

    A is the attention of a block, and y is the target's score.

    Args:
        model: a timm vision transformer with a class token, or a module that contains one.
        score: explain the target's `logit` or its `probability`.
    """

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        return torch.stack([(x * y.relu()).mean(dim=(1, 2)) for x, y in zip(a, g, strict=True)]).mean(dim=0)


@EXPLAINERS.register("chefer")
class Chefer(OfAttention):
    """Relevance by gradients: the class token's row of R, with R = I at first and R ← R + Ā R for each block, where
    Ā = mean_h ReLU(∂y/∂A ⊙ A) (Chefer et al., ICCV 2021, equations 5 and 6).

    A is the attention of a block, h runs over its heads, and y is the target's score. The tutorial's reference 27 is an
    older method of the same authors, which propagates relevance through every layer (CVPR 2021); they recommend this
    one instead.

    Args:
        model: a timm vision transformer with a class token, or a module that contains one.
        score: explain the target's `logit` or its `probability`.
    """

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        return class_row(a, g)


def class_row(a: list[Tensor], g: list[Tensor]) -> Tensor:
    """The class token's row (B, T) of (I + Ā_L) ... (I + Ā_1), where Ā = mean_h ReLU(A ⊙ g) of a block (B, h, T, T)."""
    row = torch.zeros(len(a[0]), 1, a[0].shape[-1], device=a[0].device)
    row[:, :, 0] = 1.0
    for x, y in zip(reversed(a), reversed(g), strict=True):  # from the left, without products of two matrices
        row = row + row @ (x * y).relu().mean(dim=1)
    return row[:, 0]


@EXPLAINERS.register("transformer_attribution")
class TransformerAttribution(OfAttention):
    """Transformer attribution: the class token's row of Ā_L ... Ā_1, where Ā = I + mean_h ReLU(∂y/∂A ⊙ R^A) and R^A is
    the relevance of a block's attention A by LRP (Chefer et al., CVPR 2021).

    LRP has the rules of the paper: z⁺ for linear layers, relevance passed on as it is by GELU, softmax and layer norm,
    half of it to each factor of a product and, at skip connections, the authors' normalisation, applied per image. The
    authors recommend `chefer` instead, which needs no LRP.

    Args:
        model: a timm vision transformer with a class token, or a module that contains one.

    Raises:
        NotApplicable: for another network, and for one with operations that the paper has no rule for.
    """

    needs = ("attention",)
    passes = "2"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def _passed(
        self, vit: Any, layers: list[Any], inputs: Tensor, target: Target
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        _, g = super()._passed(vit, layers, inputs, target)
        first = vit.blocks[0]
        plus = AlphaBeta(1.0, 0.0, 1e-9, bias=False)
        others: Table = {"sum": skip, "softmax": unchanged, "norm": unchanged}
        rules = Relevance(self.model, "transformer_attribution", Composite(plus, plus), others=others)

        @own_thread
        def start(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].detach().requires_grad_(True), *args[1:])

        handle = first.register_forward_pre_hook(start)
        try:
            with torch.enable_grad(), weights(layers) as a, rules:
                logits = logits_of(self.model(inputs))
        finally:
            handle.remove()
        rules.check(logits)
        score = seeded(logits, resolve_target(target, logits.detach()), 0.0)
        m = gradients(score, a)
        r = [torch.zeros_like(x) if y is None else x * finite(y, rules) for x, y in zip(a, m, strict=True)]
        return [x.detach().float() for x in r], g

    def _combine(self, a: list[Tensor], g: list[Tensor]) -> Tensor:
        return class_row(a, g)


def skip(call: Call) -> Any:
    """A sum of two features: each gets the share |Σ R_a| / (|Σ R_a| + |Σ R_b|) of an image's relevance, with R_a in
    proportion to a / (a + b) (Chefer et al., CVPR 2021)."""
    if len(call.operands) != 2 or call.name != "add" or any(x.shape != call.operands[0].shape for x in call.operands):
        return call.plain()
    kept = [Kept(x.detach().clone()) if call.in_place else call.rules.keep(x) for x in call.operands]

    def back(m: Tensor) -> list[Tensor]:
        sums = [(one.value * m).flatten(1).sum(dim=1) for one in kept]
        whole, sizes = sums[0] + sums[1], sums[0].abs() + sums[1].abs()
        shape = (-1, *(1,) * (m.dim() - 1))
        return [m * share(share(part.abs() * whole, sizes, 0.0), part, 0.0).view(shape) for part in sums]

    return call.ruled(back)
