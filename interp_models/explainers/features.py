"""Activations and gradients of a layer, for class activation maps."""

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
    """Abstract: a signed map of a layer's features, of which by default the positive part is kept.

    Args:
        model: any module that returns logits.
        layer: dotted name of the layer; None takes the last that gives a spatial map.
        relu: keep positive evidence alone.
        score: what is explained.
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
        """(B, h, w)."""


@contextmanager
def shared_passes() -> Iterator[None]:
    """While open, methods that read the same layer of the same images share one forward pass and, for the same score,
    the tail's backward. Neither weights nor images must change."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def as_map(model: nn.Module, layer: nn.Module, output: Any, size: tuple[int, int]) -> Tensor:
    """A layer's output for images of a size as a feature map (B, C, h, w); tokens (B, T, C) of a vision
    transformer are those of its patches.

    Raises:
        InputError: if the output is no feature map.
    """
    if isinstance(output, Tensor) and output.dim() == 3 and (vit := find_transformer(model)) is not None:
        return to_map(vit, output, size)
    if _is_map(output, size):
        return output
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    images = f"images of {size[0]} × {size[1]}"
    raise InputError(f"layer {type(layer).__name__} gives no map of features (B, C, h, w) of {images} but {found}")


def _is_map(output: Any, size: tuple[int, int]) -> TypeGuard[Tensor]:
    """Whether an output is (B, C, h, w) with the image's proportions, up to one cell. Otherwise channels or tokens of
    a transformer could be taken for cells."""
    if not isinstance(output, Tensor) or output.dim() != 4:
        return False
    (height, width), (h, w) = size, output.shape[2:]
    return (h - 1) * width <= (w + 1) * height and (w - 1) * height <= (h + 1) * width


def as_output(model: nn.Module, features: Tensor, output: Tensor) -> Tensor:
    """A feature map (B, C, h, w) in the form of the layer's output, for as many images or for one."""
    return to_tokens(find_transformer(model), features, output) if output.dim() == 3 else features


@contextmanager
def captured(model: nn.Module, layer: nn.Module, inputs: Tensor, *, gradient: bool) -> Iterator[list[Tensor]]:
    """While open, append the outputs of a layer for these images to the list, as maps (B, C, h, w).

    With `gradient` the graph starts at the layer's output (open this inside `torch.no_grad()`). A gradient to the layer
    then costs a forward pass and the tail's backward.
    """
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        features = as_map(model, module, output, (inputs.shape[-2], inputs.shape[-1])).detach()
        if not gradient:
            outputs.append(features.clone())  # the next layer may work in place
            return None
        start = features.requires_grad_(True)
        outputs.append(start)
        torch.set_grad_enabled(True)
        # a copy for the same reason, which a leaf of the graph does not allow
        return as_output(model, start.clone(), output.detach())

    handle = layer.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def target_layer(model: nn.Module, layer: str | None, inputs: Tensor) -> nn.Module:
    """The layer that class activation maps read: as named, as the model declares, the tokens that go into the last
    attention of a vision transformer, or the last that gives a spatial map.

    Args:
        model: the model.
        layer: dotted name of a submodule; None finds it.
        inputs: images (B, C, H, W); one is passed through the model if the layer has to be found.

    Raises:
        InputError: if there is no such layer.
        NotApplicable: if none was named, and none gives maps of features.
    """
    if layer is not None:
        named = model.network if isinstance(model, Classifier) else model  # the user knows its names
        names = [name for name, _ in named.named_modules() if name]
        if layer not in names:
            raise unknown("layer", layer, names)
        return named.get_submodule(layer)
    if explains_itself(model):
        found: nn.Module = model.feature_layer
        return found
    if (vit := find_transformer(model)) is not None:
        tokens: nn.Module = vit.blocks[-1].norm1  # what comes later has no gradient but at the class token
        return tokens
    if any(str(getattr(part, "output_fmt", "")) == "NHWC" for part in model.modules()):  # timm says so
        raise NotApplicable(f"{type(model).__name__} has its channels last; name a layer that gives (B, C, h, w)")
    known = _found.setdefault(model, {})  # by the size of the images: the search takes a pass
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
            f"no layer of {type(model).__name__} gives a map of features (B, C, h, w); name one with layer="
        )
    known[size] = spatial[-1]
    return model.get_submodule(spatial[-1])


@dataclass
class _Pass:
    """The record of one forward pass."""

    inputs: Tensor
    """The images, held so that no others take their address."""
    a: Tensor
    output: Any
    linear: list[tuple[nn.Linear, Tensor, Tensor]]
    """Layers with their inputs and outputs."""
    gradients: dict[Any, Tensor] = field(default_factory=dict)
    """g by score and classes."""


def _passed(explainer: Explainer, layer: str | None, inputs: Tensor, *, gradient: bool) -> _Pass:
    """A forward pass up to the layer without a graph and, if a gradient is asked for, from there on with one."""
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
    """A of the target layer, float32 or better (B, C, h, w), and the classes of the images (B,), by one pass."""
    made = _passed(explainer, layer, inputs, gradient=False)
    return _at_least_float32(made.a.detach()), resolve_target(target, logits_of(made.output).detach())


def activations_and_gradients(
    explainer: Explainer, layer: str | None, inputs: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """A and g = ∂y/∂A of the target layer, float32 or better (B, C, h, w): one forward pass, and the tail's backward.

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
            g = None  # after the last attention only the class token counts
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
    """A (B, C, h, w), the weights w_c (B, C) of the targets and their logits (B,), of a network whose logits are
    w · mean over cells of A + b; all float32, by one pass. None if the network does not end like that."""
    made = _passed(explainer, layer, inputs, gradient=False)
    a, logits = made.a.detach().float(), logits_of(made.output).detach()
    targets, mean = resolve_target(target, logits), a.mean(dim=(2, 3))
    for head, pooled, output in reversed(made.linear):
        if output.shape == logits.shape and torch.equal(output, logits):
            coarse = max(torch.finfo(x.dtype).eps for x in (made.a, pooled))  # under autocast
            rtol, atol = max(1e-3, 2 * coarse), max(1e-5, coarse * float(mean.abs().max()))
            if pooled.shape == mean.shape and torch.allclose(pooled.float(), mean, rtol=rtol, atol=atol):
                weights = head.weight.detach().float()[targets]
                return a, weights, logits.float().gather(1, targets[:, None])[:, 0]
            break
    return None


def last(outputs: list[Tensor]) -> Tensor:
    """The last output of a layer; raises `InputError` if it was not used."""
    if not outputs:
        raise InputError("the layer was not used in the forward pass")
    return outputs[-1]
