"""Activations of a layer and their gradients, for class activation maps."""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.maps import stretched
from interp_models.core.passes import count_reused
from interp_models.core.scoring import Score, Target, logits_of, resolve_target, scores_of
from interp_models.explainers.base import Explainer, target_scores
from interp_models.explainers.forms import KINDS, Reshape, swapped, tensor_of
from interp_models.explainers.layers import Fuse, Layer, LayerNames, stages, target_layer

_shared: "ContextVar[dict[Any, _Pass] | None]" = ContextVar("shared_passes", default=None)


class OfLayer(Explainer, ABC):
    """Abstract: an explainer that reads the feature maps of a layer.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer, or several; None finds the last feature map, see `layers.target_layer`.
        reshape: form of the layer's output, `nchw`, `nhwc`, `tokens` or a function; None finds out.
        fuse: `mean` or `max` of several layers' maps, each scaled to [0, 1] and resized to the finest grid.
        score: explain the target's `logit` or its `probability`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerNames = None,
        reshape: Reshape = None,
        fuse: Fuse = "mean",
        score: Score = "logit",
    ) -> None:
        super().__init__(model, score=score)
        check_layers(layer, reshape)
        self.layer, self.reshape, self.fuse = layer, reshape, fuse
        self._one = layer if not isinstance(layer, list) else layer[-1]

    def target_layer(self, inputs: Tensor) -> Layer:
        """The layer that is read for these images; of several, the one whose turn it is."""
        return target_layer(self.model, self._one, inputs, self.reshape)

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        if not isinstance(self.layer, list):
            return self._of_layer(inputs, target)
        maps = []
        for name in self.layer:
            self._one = name
            maps.append(self._of_layer(inputs, target))
        return fused(maps, self.fuse)

    @abstractmethod
    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        """The maps (B, h, w) of one layer, see `target_layer`."""


def check_layers(layer: LayerNames, reshape: Reshape) -> None:
    """Raise `InputError` for options `layer` and `reshape` that make no sense."""
    if reshape is not None and not callable(reshape) and reshape not in KINDS:
        raise InputError(f"reshape must be one of {', '.join(KINDS)}, or a function; got {reshape!r}")
    if reshape is not None and layer is None:
        raise InputError("reshape= says what a layer gives, so that it needs layer=NAME")
    if isinstance(layer, list) and not layer:
        raise InputError("layer must name at least one layer; got an empty list")


def fused(maps: Sequence[Tensor], fuse: Fuse) -> Tensor:
    """The mean or maximum of several maps of each image, scaled to [0, 1] and resized bilinearly to the finest grid.

    >>> coarse, fine = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.0, 0.0, 0.0, 8.0]]])
    >>> fused([coarse, fine], "mean").tolist(), fused([coarse, fine], "max").tolist()
    ([[[0.0, 0.125, 0.375, 1.0]]], [[[0.0, 0.25, 0.75, 1.0]]])
    """
    size = (max(one.shape[1] for one in maps), max(one.shape[2] for one in maps))
    large = torch.stack([stretched(one.float(), size)[:, 0] for one in maps])
    return large.mean(dim=0) if fuse == "mean" else large.amax(dim=0)


class LayerExplainer(OfLayer, ABC):
    """Abstract: a map computed from a layer's features. By default only its positive part is kept.

    A subclass implements `_signed`.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer, or several; None finds the last feature map, see `layers.target_layer`.
        reshape: form of the layer's output, `nchw`, `nhwc`, `tokens` or a function; None finds out.
        fuse: `mean` or `max` of several layers' maps, each scaled to [0, 1] and resized to the finest grid.
        relu: keep positive evidence only.
        score: explain the target's `logit` or its `probability`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: LayerNames = None,
        reshape: Reshape = None,
        fuse: Fuse = "mean",
        relu: bool = True,
        score: Score = "logit",
    ) -> None:
        super().__init__(model, layer=layer, reshape=reshape, fuse=fuse, score=score)
        self.relu = relu

    def _of_layer(self, inputs: Tensor, target: Target) -> Tensor:
        maps = self._signed(inputs, target)
        return maps.relu() if self.relu else maps

    @abstractmethod
    def _signed(self, inputs: Tensor, target: Target) -> Tensor:
        """The map (B, h, w) before the ReLU."""


@contextmanager
def shared_passes() -> Iterator[None]:
    """While open, explainers that read the same layer for the same images share one forward pass. Those that also
    explain the same score share its gradient. Weights and images must not change meanwhile."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


@contextmanager
def captured(layer: Layer, *, gradient: bool) -> Iterator[list[Tensor]]:
    """While open, append the layer's output to the list; see `Layer.form` for its form.

    With `gradient`, the autograd graph starts at the layer's output; open this inside `torch.no_grad()`. The gradient
    with respect to the layer then costs one forward pass and the backward pass of the layers after it.
    """
    outputs: list[Tensor] = []
    calls = itertools.count()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if next(calls) != layer.use:
            return None
        tensor = tensor_of(output)
        if tensor is None:
            raise InputError(f"layer {layer.name} gives no tensor but {type(output).__name__}")
        if not gradient:
            outputs.append(tensor.detach().clone())  # the next layer may modify it in place
            return None
        start = tensor.detach().requires_grad_(True)
        outputs.append(start)
        torch.set_grad_enabled(True)
        return swapped(output, start.clone())  # the next layer may work in place, which autograd forbids for a leaf

    handle = layer.module.register_forward_hook(own_thread(hook))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def captured_together(layers: Sequence[Layer], *, gradient: bool) -> Iterator[dict[int, Tensor]]:
    """As `captured`, of several layers in one pass: outputs by the layer's place in the sequence. With `gradient`, the
    autograd graph starts at the output of the first that runs."""
    outputs: dict[int, Tensor] = {}

    def hook_of(place: int, layer: Layer) -> Any:
        calls = itertools.count()

        @own_thread
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = tensor_of(output)
            if next(calls) != layer.use or tensor is None:
                return None
            if not gradient:
                outputs[place] = tensor.detach().clone()  # the next layer may modify it in place
                return None
            outputs[place] = tensor if tensor.requires_grad else tensor.detach().requires_grad_(True)
            torch.set_grad_enabled(True)
            return swapped(output, outputs[place].clone())

        return hook

    handles = [layer.module.register_forward_hook(hook_of(place, layer)) for place, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(layer: Layer, features: Tensor) -> Iterator[None]:
    """While open, for one pass, the layer's output has the features (B, C, h, w) in place of its own; the pass may
    be of one image only."""
    calls = itertools.count()

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if next(calls) != layer.use or (tensor := tensor_of(output)) is None:
            return None
        return swapped(output, layer.form.replaced(tensor, features))

    handle = layer.module.register_forward_hook(own_thread(hook))
    try:
        yield
    finally:
        handle.remove()


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
        count_reused(inputs)
        return dataclasses.replace(shared[key], layer=layer)
    linear: list[tuple[nn.Linear, Tensor, Tensor]] = []

    @own_thread
    def note(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        given, kept = args[0] if args else kwargs["input"], output.detach()
        linear.append((part, given.detach(), kept.clone() if kept.dim() == 2 else kept))  # it may change in place

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
    made = _Pass(inputs, layer, outputs[0], output, linear)
    if shared is not None:
        shared[key] = made
    return made


def activations(explainer: OfLayer, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Feature maps A of the target layer, float32 or better (B, C, h, w), and the explained classes (B,), by one
    pass."""
    made = _passed(explainer, inputs, gradient=False)
    return _at_least_float32(made.a.detach()), resolve_target(target, logits_of(made.output).detach())


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
        return _at_least_float32(made.a.detach()), _gradient(made, of)
    if key not in made.gradients:
        made.gradients[key] = _gradient(made, lambda output: target_scores(output, explainer.score, target))
    return _at_least_float32(made.a.detach()), made.gradients[key]


def _gradient(made: _Pass, of: Callable[[Any], Tensor]) -> Tensor:
    """The gradient of values of the model's output with respect to A."""
    with torch.enable_grad():
        score = of(made.output).sum()
    g = None
    if score.requires_grad:
        (g,) = torch.autograd.grad(score, made.raw, allow_unused=True, retain_graph=_shared.get() is not None)
    if g is not None and g.dim() == 3 and not made.layer.feature_map(g).any():
        g = None  # after the last attention only the class token reaches the score
    if g is None:
        raise NotApplicable(f"no gradient path from the score back to layer {made.layer.name}")
    return _at_least_float32(made.layer.feature_map(g))


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
        gradients: Sequence[Tensor | None] = [None] * len(raw)
        if logits.requires_grad:
            with torch.enable_grad():
                score = logits.gather(1, targets[:, None]).sum()
            gradients = torch.autograd.grad(score, raw, allow_unused=True)
        for one, g in zip(layers, gradients, strict=True):
            if g is None:
                raise NotApplicable(f"no gradient path from the score back to layer {one.name}")
            found.append(_at_least_float32(one.feature_map(g)))
    pairs = zip(layers, raw, strict=True)
    return [_at_least_float32(one.feature_map(x.detach())) for one, x in pairs], found, targets


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
