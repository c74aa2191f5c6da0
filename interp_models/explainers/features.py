"""A layer's feature maps and their gradients, by one pass."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.maps import at_least_float32
from interp_models.core.norms import gradients
from interp_models.core.passes import count_reused, seconds_now
from interp_models.core.scoring import Target, logits_of, resolve_target, scores_of
from interp_models.explainers.base import gradient_of, no_path, target_scores
from interp_models.explainers.captures import captured, captured_together
from interp_models.explainers.forms import Reshape
from interp_models.explainers.layers import Layer, stages, target_layer
from interp_models.explainers.of_layer import LayerNames, OfLayer

_shared: "ContextVar[dict[Any, _Pass] | None]" = ContextVar("shared_passes", default=None)


@contextmanager
def shared_passes() -> Iterator[None]:
    """While open, explainers that read the same layer for the same images share one forward pass. Those that also
    explain the same score share its gradient. Weights and images must not change meanwhile."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


@dataclass
class _Pass:
    """Results of one forward pass."""

    inputs: Tensor
    """The images. The reference keeps their memory address, which is part of the key, from being reused."""
    layer: Layer
    raw: Tensor
    """The layer's output."""
    output: Any
    linear: list[tuple[nn.Linear, Tensor, Tensor]]
    """Linear layers with their inputs and outputs."""
    seconds: float
    """Time of the pass; 0 if no other method can reuse it."""
    gradients: dict[Any, Tensor] = field(default_factory=dict)
    """∂y/∂A by score and classes."""

    @property
    def a(self) -> Tensor:
        """Feature maps A (B, C, h, w) of the layer."""
        return self.layer.feature_map(self.raw)


def _passed(explainer: OfLayer, inputs: Tensor, *, gradient: bool) -> _Pass:
    """Run a forward pass. With `gradient` the autograd graph starts at the layer."""
    model, shared = explainer.model, _shared.get()
    layer = explainer.target_layer(inputs)
    place = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride(), inputs.dtype, inputs._version)
    key = (id(model), id(layer.module), layer.use, *place, torch.is_autocast_enabled(inputs.device.type))
    if shared is not None and key in shared:
        count_reused(inputs, shared[key].seconds)
        return dataclasses.replace(shared[key], layer=layer)
    linear: list[tuple[nn.Linear, Tensor, Tensor]] = []

    @own_thread
    def note(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        given, kept = args[0] if args else kwargs["input"], output.detach()
        linear.append((part, given.detach(), kept.clone() if kept.dim() == 2 else kept))  # it may change in place

    start = 0.0 if shared is None else seconds_now(inputs)
    parts = [part for part in model.modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_hook(note, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad(), captured(layer, gradient=gradient or shared is not None) as outputs:
            output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise InputError(f"layer {layer.name} was not used in the forward pass")
    if len(outputs[0]) != len(inputs):
        raise NotApplicable(f"layer {layer.name} gives {len(outputs[0])} rows for {len(inputs)} images, not one each")
    seconds = 0.0 if shared is None else seconds_now(inputs) - start
    made = _Pass(inputs, layer, outputs[0], output, linear, seconds)
    if shared is not None:
        shared[key] = made
    return made


def activations(explainer: OfLayer, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Feature maps A of the target layer, float32 or better (B, C, h, w), and the explained classes (B,), by one
    pass."""
    made = _passed(explainer, inputs, gradient=False)
    return at_least_float32(made.a.detach()), resolve_target(target, logits_of(made.output).detach())


def activations_and_gradients(
    explainer: OfLayer, inputs: Tensor, target: Target, of: Callable[[Any], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """A and g = ∂y/∂A of the target layer, float32 or better (B, C, h, w): one forward pass, and the backward pass of
    the layers after it.

    Args:
        explainer: names the model, the layer and the score.
        inputs: images (B, C, H, W).
        target: class: one for all images, one per image (B,), or None for the predicted class.
        of: maps the model's output to the values y (B,); None takes the target's score.

    Raises:
        NotApplicable: if the score does not depend on the layer through differentiable operations.
    """
    made = _passed(explainer, inputs, gradient=True)
    classes = None if target is None else tuple(torch.as_tensor(target).flatten().tolist())
    key = (explainer.score, classes)
    if of is not None:
        return at_least_float32(made.a.detach()), _gradient(made, of)
    if key not in made.gradients:
        made.gradients[key] = _gradient(made, lambda output: target_scores(output, explainer.score, target))
    return at_least_float32(made.a.detach()), made.gradients[key]


def _gradient(made: _Pass, of: Callable[[Any], Tensor]) -> Tensor:
    """The gradient of values of the model's output with respect to A."""
    with torch.enable_grad():
        score = of(made.output).sum()
    what = f"layer {made.layer.name}"
    g = gradient_of(score, made.raw, what, again=_shared.get() is not None)
    if g.dim() == 3 and not made.layer.feature_map(g).any():
        raise no_path(what)  # after the last attention only the class token reaches the score
    return at_least_float32(made.layer.feature_map(g))


def stage_activations(
    model: nn.Module, layer: LayerNames, reshape: Reshape, inputs: Tensor, target: Target, *, gradient: bool
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Feature maps of the layers that are named, or of those that `layers.stages` finds, by one pass.

    Returns:
        A of each layer, float32 or better (B, C, h, w); with `gradient`, ∂y/∂A for the target's logit y, else an empty
        list; and the explained classes (B,).

    Raises:
        NotApplicable: if the logit does not depend on a layer through differentiable operations.
    """
    names = [layer] if isinstance(layer, str) else layer
    layers = stages(model, inputs) if names is None else [target_layer(model, x, inputs, reshape) for x in names]
    with torch.no_grad(), captured_together(layers, gradient=gradient) as outputs:
        output = model(inputs)
    missing = [one.name for place, one in enumerate(layers) if place not in outputs]
    if missing:
        raise InputError(f"layer {missing[0]} was not used in the forward pass, or gives no tensor")
    logits = scores_of(output, "logit")
    targets, found = resolve_target(target, logits.detach()), []
    raw = [outputs[place] for place in range(len(layers))]
    if gradient:
        slopes: Sequence[Tensor | None] = [None] * len(raw)
        if logits.requires_grad:
            with torch.enable_grad():
                score = logits.gather(1, targets[:, None]).sum()
            slopes = gradients(score, raw)
        for one, g in zip(layers, slopes, strict=True):
            if g is None:
                raise no_path(f"layer {one.name}")
            found.append(at_least_float32(one.feature_map(g)))
    pairs = zip(layers, raw, strict=True)
    return [at_least_float32(one.feature_map(x.detach())) for one, x in pairs], found, targets


def linear_head(explainer: OfLayer, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor] | None:
    """Read the head of a network whose logits are w · (mean over cells of A) + b, by one pass. Both are checked.

    Returns:
        A (B, C, h, w), the targets' weights w_c (B, C) and their logits (B,), all float32. None for other networks.
    """
    made = _passed(explainer, inputs, gradient=False)
    a, logits = made.a.detach().float(), logits_of(made.output).detach()
    targets, mean = resolve_target(target, logits), a.mean(dim=(2, 3))
    for head, pooled, output in reversed(made.linear):
        if output.shape == logits.shape and torch.equal(output, logits):
            coarse = max(torch.finfo(x.dtype).eps for x in (made.a, pooled))  # autocast may have lowered the precision
            rtol, atol = max(1e-3, 2 * coarse), max(1e-5, coarse * float(mean.abs().max()))
            bias = None if head.bias is None else head.bias.detach().float()
            plain = nn.functional.linear(pooled.float(), head.weight.detach().float(), bias)
            near = max(1e-4, 4 * coarse) * float(plain.abs().max())  # a cosine or a hook gives other logits
            if float((plain - logits.float()).abs().max()) > near:
                break
            if pooled.shape == mean.shape and torch.allclose(pooled.float(), mean, rtol=rtol, atol=atol):
                weights = head.weight.detach().float()[targets]
                return a, weights, logits.float().gather(1, targets[:, None])[:, 0]
            break
    return None
