"""What class activation maps read of a model: a layer's activations, gradients and what comes after it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp_models.errors import InputError
from interp_models.explainers.base import Explainer, target_scores
from interp_models.registry import unknown
from interp_models.scoring import Score, Target, explains_itself, logits_of, resolve_target

_shared: ContextVar[dict[Any, tuple[Tensor, Tensor, Tensor]] | None] = ContextVar("shared_passes", default=None)
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
    """While open, methods that read the same layer's activations and gradients, for the same score of the same images,
    share one forward pass and the tail's backward. The model's weights must not change."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


@contextmanager
def captured(layer: nn.Module, *, gradient: bool) -> Iterator[list[Tensor]]:
    """While open, the outputs (B, C, h, w) of a layer are appended to the list that is given.

    With `gradient` the layer's output becomes the start of the graph: whatever comes before it runs without one (open
    this inside `torch.no_grad()`), so that a gradient to the layer costs a plain forward pass and the tail's backward.
    """
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.dim() != 4:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"layer {type(module).__name__} gives no map of features (B, C, h, w) but {found}")
        if not gradient:
            outputs.append(output.detach().clone())  # the next layer may work in place
            return None
        start = output.detach().requires_grad_(True)
        outputs.append(start)
        torch.set_grad_enabled(True)
        return start.clone()  # for the same reason, which a leaf of the graph does not allow

    handle = layer.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def target_layer(model: nn.Module, layer: str | None, inputs: Tensor) -> nn.Module:
    """The layer that class activation maps read: as named, as the model declares, or the last that gives a spatial map.

    Args:
        model: the model.
        layer: dotted name of a submodule; None finds it.
        inputs: images (B, C, H, W); one is passed through the model if the layer has to be found.

    Raises:
        InputError: if there is no such layer.
    """
    if layer is not None:
        names = [name for name, _ in model.named_modules() if name]
        if layer not in names:
            raise unknown("layer", layer, names)
        return model.get_submodule(layer)
    if explains_itself(model):
        found: nn.Module = model.feature_layer
        return found
    known = _found.setdefault(model, {})  # by the size of the images: the search takes a pass
    size = tuple(inputs.shape[1:])
    if size in known:
        return model.get_submodule(known[size])
    spatial: list[str] = []

    def noted(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] * output.shape[-2] > 1:
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
        raise InputError(
            f"no layer of {type(model).__name__} gives a map of features (B, C, h, w); name one with layer="
        )
    known[size] = spatial[-1]
    return model.get_submodule(spatial[-1])


def activations(
    explainer: Explainer, layer: str | None, inputs: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """A of the target layer, float32 (B, C, h, w), and the classes of the images (B,), by one pass."""
    module = target_layer(explainer.model, layer, inputs)
    with torch.no_grad(), captured(module, gradient=False) as outputs:
        targets = resolve_target(target, logits_of(explainer.model(inputs)))
    return last(outputs).float(), targets


def activations_and_gradients(
    explainer: Explainer, layer: str | None, inputs: Tensor, target: Target
) -> tuple[Tensor, Tensor]:
    """A and g = ∂y/∂A of the target layer, both float32 (B, C, h, w): one forward pass, and the tail's backward.

    Raises:
        InputError: if the score does not depend on the layer through differentiable operations.
    """
    module = target_layer(explainer.model, layer, inputs)
    shared = _shared.get()
    classes = None if target is None else tuple(torch.as_tensor(target).flatten().tolist())
    place = (inputs.data_ptr(), tuple(inputs.shape), inputs._version)
    key = (id(explainer.model), id(module), explainer.score, classes, place)
    if shared is not None and key in shared:
        return shared[key][1:]
    with torch.no_grad(), captured(module, gradient=True) as outputs:
        score = target_scores(explainer.model(inputs), explainer.score, target).sum()
    a = last(outputs)
    g = None
    if score.requires_grad:
        (g,) = torch.autograd.grad(score, a, allow_unused=True)
    if g is None:
        raise InputError(f"no gradient path from the score back to layer {layer or type(module).__name__}")
    found = (a.detach().float(), g.float())
    if shared is not None:
        shared[key] = (inputs, *found)  # the images are held, so that no others come to lie at their place
    return found


def linear_head(
    explainer: Explainer, layer: str | None, inputs: Tensor, target: Target
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A (B, C, h, w), the weights w_c (B, C) of the targets and their logits (B,), of a network whose logits are
    w · mean over cells of A + b; all float32, by one pass. None if the network does not end like that."""
    model, seen = explainer.model, list[tuple[nn.Linear, Tensor, Tensor]]()

    def note(module: Any, args: Any, output: Any) -> None:
        seen.append((module, args[0].detach(), output.detach()))

    handles = [part.register_forward_hook(note) for part in model.modules() if isinstance(part, nn.Linear)]
    try:
        with torch.no_grad(), captured(target_layer(model, layer, inputs), gradient=False) as outputs:
            logits = logits_of(model(inputs))
    finally:
        for handle in handles:
            handle.remove()
    a, targets = last(outputs).float(), resolve_target(target, logits)
    mean = a.mean(dim=(2, 3))
    for head, pooled, output in reversed(seen):
        if output.shape == logits.shape and torch.equal(output, logits):
            if pooled.shape == mean.shape and torch.allclose(pooled.float(), mean, rtol=1e-3, atol=1e-5):
                weights = head.weight.detach().float()[targets]
                return a, weights, logits.float().gather(1, targets[:, None])[:, 0]
            break
    return None


def last(outputs: list[Tensor]) -> Tensor:
    """What a layer gave, when it was used last; raises `InputError` if it was not used."""
    if not outputs:
        raise InputError("the layer was not used in the forward pass")
    return outputs[-1]
