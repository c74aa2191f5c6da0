"""Feature maps weighted by what the score loses without them: Ablation-CAM and LIFT-CAM."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.errors import NotApplicable
from interp_models.core.maps import weighted
from interp_models.core.scoring import Target, logits_of, scores_of
from interp_models.explainers.base import EXPLAINERS, target_scores
from interp_models.explainers.features import LayerExplainer, activations, as_output, linear_head, target_layer

VALUES = 2**21
"""Activations per pass of the tail, 8 MiB: larger passes share the fixed cost of a pass."""


class _OfTail(LayerExplainer, ABC):
    """Abstract: a map Σ_k w_k A_k whose weights need the part of the model after the layer alone."""

    def _signed(self, inputs: Tensor, target: Target) -> Tensor:
        head = linear_head(self, self.layer, inputs, target) if self.score == "logit" else None
        if head is not None:
            a, w, y = head
            weights = self._closed(a, w, y)
        else:
            a, targets = activations(self, self.layer, inputs, target)
            weights = self._general(inputs, a, targets)
        return weighted(weights, a)

    @abstractmethod
    def _closed(self, a: Tensor, w: Tensor, y: Tensor) -> Tensor:
        """Weights (B, C) where y = w · mean over cells of A + b."""

    @abstractmethod
    def _general(self, inputs: Tensor, a: Tensor, targets: Tensor) -> Tensor:
        """Weights (B, C) of any tail."""

    def _tail(self, image: Tensor, variants: Tensor) -> Any:
        """Run the model with activations (n, C, h, w) in place of the layer's output. The part before the layer passes
        the one image (1, 3, H, W), or copies of it where the tail also reads earlier outputs."""
        module = target_layer(self.model, self.layer, image)
        handle = module.register_forward_hook(lambda _, args, output: as_output(self.model, variants.clone(), output))
        try:
            try:
                output = self.model(image)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # shapes do not match
                output = None
            if output is None or len(logits_of(output)) != len(variants):  # the batch size was read before the layer
                output = self.model(image.expand(len(variants), -1, -1, -1))
        finally:
            handle.remove()
        if len(logits_of(output)) != len(variants):
            raise NotApplicable(f"{type(self.model).__name__} gives no logits for each of the layer's activations")
        return output


@EXPLAINERS.register("ablationcam")
class AblationCAM(_OfTail):
    """Ablation-CAM = ReLU(Σ_k w_k A_k) with w_k = (y - y without A_k) / |y| (Desai and Ramaswamy, WACV 2020).

    A channel is taken away by setting it to 0. The tail after the layer alone is passed for each channel; on a network
    that ends in a mean and a linear layer w_k is w_ck · mean of A_k / |y|, without a pass.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer; None takes the last that gives a spatial map.
        relu: keep positive evidence alone, as in the paper.
        score: what is explained.
    """

    def _closed(self, a: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return w * a.mean(dim=(2, 3)) / _guarded(y)

    @torch.no_grad()
    def _general(self, inputs: Tensor, a: Tensor, targets: Tensor) -> Tensor:
        channels, weights = a.shape[1], a.new_zeros(a.shape[:2])
        for i, c in enumerate(targets):
            y = scores_of(self._tail(inputs[i : i + 1], a[i : i + 1].to(inputs.dtype)), self.score)[0, c]
            for some in torch.split(torch.arange(channels, device=a.device), max(1, VALUES // a[0].numel())):
                variants = a[i].repeat(len(some), 1, 1, 1).to(inputs.dtype)
                variants[torch.arange(len(some)), some] = 0.0
                without = scores_of(self._tail(inputs[i : i + 1], variants), self.score)[:, c]
                weights[i, some] = (y - without).to(a.dtype) / _guarded(y)
        return weights


@EXPLAINERS.register("liftcam")
class LIFTCAM(_OfTail):
    """LIFT-CAM = ReLU(Σ_k w_k A_k) with w_k the sum over cells of DeepLIFT's contributions of A_k to the score, from
    activations of 0 (Jung and Oh, ICCV 2021, section 4.2).

    On a network that ends in a mean and a linear layer w_k is w_ck · mean of A_k. Else contributions come from
    DeepLIFT's rescale rule at activation modules, and refused is a tail where they do not add up to the score's change.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer; None takes the last that gives a spatial map.
        relu: keep positive evidence alone, as in the paper.
        score: what is explained.
    """

    needs = ("rescale_tail",)

    def _closed(self, a: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return w * a.mean(dim=(2, 3))

    def _general(self, inputs: Tensor, a: Tensor, targets: Tensor) -> Tensor:
        weights = []
        for i in range(len(a)):
            both = torch.stack([a[i], torch.zeros_like(a[i])]).to(inputs.dtype).requires_grad_(True)
            with torch.enable_grad(), rescaled(self.model):
                scores = target_scores(self._tail(inputs[i : i + 1], both), self.score, targets[i].repeat(2))
                multiplier = None
                if scores.requires_grad:
                    (multiplier,) = torch.autograd.grad(scores[0], both, allow_unused=True)
            if multiplier is None:
                raise NotApplicable("no gradient path from the score back to the layer")
            contributions = (multiplier[0] * both[0]).detach().float()
            change = float((scores[0] - scores[1]).detach())
            if abs(float(contributions.sum()) - change) > 1e-3 * max(abs(change), float(contributions.abs().sum())):
                raise NotApplicable(
                    f"liftcam: contributions add up to {float(contributions.sum()):.4g}, the score changes by "
                    f"{change:.4g}: after the layer {type(self.model).__name__} does what DeepLIFT's rescale rule does "
                    "not cover"
                )
            weights.append(contributions.sum(dim=(1, 2)))
        return torch.stack(weights)


def _guarded(y: Tensor) -> Tensor:
    """|y|, at least 1e-6, as a divisor."""
    size = y.abs().clamp(min=1e-6)
    return size[:, None] if size.dim() else size


ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid,
)  # fmt: skip


class _Rescale(torch.autograd.Function):
    """The output of an activation of x and, as the second half of the batch, of the reference; backwards its slope
    between the two, or where they are equal its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        half = len(x) // 2
        dx, dy = x[:half] - x[half:], y[:half] - y[half:]
        same = dx.abs() < 1e-6
        slope = torch.where(same, derivative[:half], dy / torch.where(same, 1.0, dx))
        ctx.save_for_backward(torch.cat([slope, slope]))
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None


@contextmanager
def rescaled(model: nn.Module) -> Iterator[None]:
    """While open, activation modules follow DeepLIFT's rescale rule backwards: the batch is images and references."""
    kept: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: Any) -> Any:
        kept[module] = args[0]
        return (args[0].clone(), *args[1:])  # it may work in place

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        x = kept.pop(module)
        if len(x) % 2:  # before the layer there is one image
            return None
        with torch.enable_grad():
            start = x.detach().requires_grad_(True)
            y = type(module).forward(module, start.clone())
            (derivative,) = torch.autograd.grad(y.sum(), start)
        return _Rescale.apply(x, y.detach(), derivative)  # type: ignore[no-untyped-call]

    handles = []
    for part in model.modules():
        if isinstance(part, ELEMENTWISE):
            handles += [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
