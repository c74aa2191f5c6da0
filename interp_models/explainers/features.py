"""Activations of a layer and their gradients, for class activation maps."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp_models.core.classifier import Classifier
from interp_models.core.errors import InputError, NotApplicable, unknown
from interp_models.core.passes import count_reused
from interp_models.core.scoring import Score, Target, explains_itself, logits_of, resolve_target
from interp_models.explainers.base import Explainer, target_scores
from interp_models.nn.attention import find_transformer, to_map, to_tokens

_shared: "ContextVar[dict[Any, _Pass] | None]" = ContextVar("shared_passes", default=None)
_found: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], str]]" = WeakKeyDictionary()


class LayerExplainer(Explainer, ABC):
    """Abstract: a map computed from a layer's features. By default only its positive part is kept.

    A subclass implements `_signed`.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer; None takes the last one that outputs a spatial map.
        relu: keep positive evidence only.
        score: explain the target's `logit` or its `probability`.
    """

    def __init__(
        self, model: nn.Module, *, layer: str | None = None, relu: bool = True, score: Score = "logit"
    ) -> None:
        super().__init__(model, score=score)
        self.layer, self.relu = layer, relu

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
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


def as_map(model: nn.Module, layer: nn.Module, output: Any, size: tuple[int, int]) -> Tensor:
    """A layer's output as a feature map (B, C, h, w). For a vision transformer, patch tokens become cells.

    Args:
        model: the model, searched for a vision transformer.
        layer: the layer, for messages.
        output: what it returned: a map (B, C, h, w) or tokens (B, T, C).
        size: height and width of the images.

    Raises:
        InputError: if the output is not a feature map.
    """
    if isinstance(output, Tensor) and output.dim() == 3 and (vit := find_transformer(model)) is not None:
        return to_map(vit, output, size)
    if _is_map(output, size):
        return output
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise InputError(
        f"layer {type(layer).__name__} gives no feature map (B, C, h, w) for images of {size[0]} × {size[1]}; it gives "
        f"{found}"
    )


def _is_map(output: Any, size: tuple[int, int]) -> TypeGuard[Tensor]:
    """Whether an output has the form (B, C, h, w) with the image's aspect ratio, up to one cell. Without this check,
    channels or tokens could be mistaken for cells."""
    if not isinstance(output, Tensor) or output.dim() != 4:
        return False
    (height, width), (h, w) = size, output.shape[2:]
    return (h - 1) * width <= (w + 1) * height and (w - 1) * height <= (h + 1) * width


def as_output(model: nn.Module, features: Tensor, output: Tensor) -> Tensor:
    """Bring a feature map (B, C, h, w) to the form of the layer's output, which may be of one image only."""
    return to_tokens(find_transformer(model), features, output) if output.dim() == 3 else features


@contextmanager
def captured(model: nn.Module, layer: nn.Module, inputs: Tensor, *, gradient: bool) -> Iterator[list[Tensor]]:
    """While open, append each output of the layer to the list, as a map (B, C, h, w).

    With `gradient`, the autograd graph starts at the layer's output; open this inside `torch.no_grad()`. The gradient
    with respect to the layer then costs one forward pass and the backward pass of the layers after it.
    """
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        features = as_map(model, module, output, (inputs.shape[-2], inputs.shape[-1])).detach()
        if not gradient:
            outputs.append(features.clone())  # the next layer may modify it in place
            return None
        start = features.requires_grad_(True)
        outputs.append(start)
        torch.set_grad_enabled(True)
        # A copy: the next layer may work in place, which autograd forbids for a leaf.
        return as_output(model, start.clone(), output.detach())

    handle = layer.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def target_layer(model: nn.Module, layer: str | None, inputs: Tensor) -> nn.Module:
    """Find the layer that class activation maps read.

    Without a name it is, in this order: the `feature_layer` of the model, the input of a vision transformer's last
    attention, or the last layer that outputs a spatial map.

    Args:
        model: the model.
        layer: dotted name of a submodule; None searches for it.
        inputs: images (B, C, H, W); the search passes one of them through the model.

    Raises:
        InputError: if the named layer does not exist.
        NotApplicable: if the search finds no layer.
    """
    if layer is not None:
        named = model.network if isinstance(model, Classifier) else model  # the user knows the network's names
        names = [name for name, _ in named.named_modules() if name]
        if layer not in names:
            raise unknown("layer", layer, names)
        return named.get_submodule(layer)
    if explains_itself(model):
        found: nn.Module = model.feature_layer
        return found
    if (vit := find_transformer(model)) is not None:
        tokens: nn.Module = vit.blocks[-1].norm1  # in later layers only the class token has a gradient
        return tokens
    if any(str(getattr(part, "output_fmt", "")) == "NHWC" for part in model.modules()):  # timm declares it
        raise NotApplicable(
            f"{type(model).__name__} has its channels last; name a layer that gives (B, C, h, w) with layer="
        )
    known = _found.setdefault(model, {})  # cached by image size, as the search takes a pass
    size = tuple(inputs.shape[1:])
    if size in known:
        return model.get_submodule(known[size])
    spatial: list[str] = []

    def noted(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if _is_map(output, (inputs.shape[2], inputs.shape[3])) and output.shape[-1] * output.shape[-2] > 1:
                spatial.append(name)

        return note

    handles = [module.register_forward_hook(noted(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not spatial:
        raise NotApplicable(
            f"no layer of {type(model).__name__} gives a feature map (B, C, h, w); name one with layer="
        )
    known[size] = spatial[-1]
    return model.get_submodule(spatial[-1])


@dataclass
class _Pass:
    """Results of one forward pass."""

    inputs: Tensor
    """The images. The reference keeps their memory address, which is part of the key, from being reused."""
    a: Tensor
    """Feature maps of the layer."""
    output: Any
    linear: list[tuple[nn.Linear, Tensor, Tensor]]
    """Linear layers with their inputs and outputs."""
    gradients: dict[Any, Tensor] = field(default_factory=dict)
    """∂y/∂A by score and classes."""


def _passed(explainer: Explainer, layer: str | None, inputs: Tensor, *, gradient: bool) -> _Pass:
    """Run a forward pass. With `gradient` the autograd graph starts at the layer."""
    model, module, shared = explainer.model, target_layer(explainer.model, layer, inputs), _shared.get()
    place = (inputs.data_ptr(), tuple(inputs.shape), inputs.stride(), inputs.dtype, inputs._version)
    key = (id(model), id(module), *place, torch.is_autocast_enabled(inputs.device.type))
    if shared is not None and key in shared:
        count_reused(inputs)
        return shared[key]
    linear: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(part: Any, args: Any, output: Any) -> None:
        linear.append((part, args[0].detach(), output.detach()))

    handles = [part.register_forward_hook(note) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        with torch.no_grad(), captured(model, module, inputs, gradient=gradient or shared is not None) as outputs:
            output = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    made = _Pass(inputs, last(outputs), output, linear)
    if shared is not None:
        shared[key] = made
    return made


def activations(explainer: Explainer, layer: str | None, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Feature maps A of the target layer, float32 or better (B, C, h, w), and the explained classes (B,), by one
    pass."""
    made = _passed(explainer, layer, inputs, gradient=False)
    return _at_least_float32(made.a.detach()), resolve_target(target, logits_of(made.output).detach())


def activations_and_gradients(
    explainer: Explainer, layer: str | None, inputs: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """A and g = ∂y/∂A of the target layer, float32 or better (B, C, h, w): one forward pass, and the backward pass of
    the layers after it.

    Raises:
        NotApplicable: if the score does not depend on the layer through differentiable operations.
    """
    made = _passed(explainer, layer, inputs, gradient=True)
    classes = None if target is None else tuple(torch.as_tensor(target).flatten().tolist())
    key = (explainer.score, classes)
    if key not in made.gradients:
        with torch.enable_grad():
            score = target_scores(made.output, explainer.score, target).sum()
        g = None
        if score.requires_grad:
            (g,) = torch.autograd.grad(score, made.a, allow_unused=True, retain_graph=_shared.get() is not None)
        if g is not None and not g.any() and find_transformer(explainer.model) is not None:
            g = None  # zeros: after the last attention only the class token reaches the score
        if g is None:
            module = type(target_layer(explainer.model, layer, inputs)).__name__
            raise NotApplicable(f"no gradient path from the score back to layer {layer or module}")
        made.gradients[key] = _at_least_float32(g)
    return _at_least_float32(made.a.detach()), made.gradients[key]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_head(
    explainer: Explainer, layer: str | None, inputs: Tensor, target: Target
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Read the head of a network whose logits are w · (mean over cells of A) + b, by one pass.

    Returns:
        A (B, C, h, w), the targets' weights w_c (B, C) and their logits (B,), all float32. None for other networks.
    """
    made = _passed(explainer, layer, inputs, gradient=False)
    a, logits = made.a.detach().float(), logits_of(made.output).detach()
    targets, mean = resolve_target(target, logits), a.mean(dim=(2, 3))
    for head, pooled, output in reversed(made.linear):
        if output.shape == logits.shape and torch.equal(output, logits):
            coarse = max(torch.finfo(x.dtype).eps for x in (made.a, pooled))  # autocast may have lowered the precision
            rtol, atol = max(1e-3, 2 * coarse), max(1e-5, coarse * float(mean.abs().max()))
            if pooled.shape == mean.shape and torch.allclose(pooled.float(), mean, rtol=rtol, atol=atol):
                weights = head.weight.detach().float()[targets]
                return a, weights, logits.float().gather(1, targets[:, None])[:, 0]
            break
    return None


def last(outputs: list[Tensor]) -> Tensor:
    """The last output of a layer. Raises `InputError` if the layer did not run."""
    if not outputs:
        raise InputError("the layer was not used in the forward pass")
    return outputs[-1]
