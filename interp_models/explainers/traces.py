"""The outputs of a network's modules in a pass, and what of the image passes through each of them."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.batches import default_batch
from interp_models.core.eager import nodes_of, own_thread
from interp_models.core.norms import gradients
from interp_models.core.scoring import logits_of
from interp_models.explainers.forms import Form, possible_forms, swapped, tensor_of


@dataclass
class Output:
    """One output of a module in a traced pass."""

    name: str
    use: int
    shape: tuple[int, ...]
    """Its shape for one image."""
    forms: list[Form]
    """Forms of a feature map that its shape allows."""
    node: Any = None
    """Its node of the autograd graph; None if it has none."""
    source: Any = None
    """The node of the module's input."""
    tensor: Tensor | None = None
    """The tokens of one image, with their graph."""


@dataclass
class Trace:
    """The outputs of all modules of a network, in the order in which they are ready."""

    outputs: list[Output]
    score: Tensor | None
    """A random combination of the logits; None if no gradient flows from them to the image."""
    image: Any
    """Node of the image."""
    _above: dict[Any, set[Any]] = field(default_factory=dict)

    def above(self, node: Any) -> set[Any]:
        """All nodes that a node depends on, and the node itself."""
        if node not in self._above:
            self._above[node] = nodes_of(node)
        return self._above[node]

    def matters(self, output: Output) -> bool:
        """Whether the logits depend on an output."""
        return self.score is not None and output.node in self.above(self.score.grad_fn)

    def holds_all(self, output: Output) -> bool:
        """Whether everything that the logits know of the image passes through an output."""
        if self.score is None or not self.matters(output):
            return False
        return self.image not in nodes_of(self.score.grad_fn, without=output.node)

    def passes(self, output: Output, last: Output) -> bool:
        """Whether all that the logits read of an output passes through a later one."""
        if self.score is None or output.node is None or last.node is None:
            return False
        return output.node in self.above(last.node) and output.node not in nodes_of(self.score.grad_fn, last.node)

    def feeds_all(self, output: Output) -> bool:
        """Whether everything that the logits know of the image passes through what the module was given."""
        if self.score is None or output.source is None or not self.matters(output):
            return False
        return self.image not in nodes_of(self.score.grad_fn, without=output.source)


def traced(model: nn.Module, image: Tensor, only: str | None = None) -> Trace:
    """Trace the outputs of all modules, or only of one, for an image."""
    outputs: dict[tuple[str, int], Output] = {}

    def linked(name: str, use: int, output: Tensor, given: Any) -> None:
        if len(output) == 1 and output.dim() > 1:
            shape = tuple(output.shape[1:])
            forms = list(possible_forms(shape, tuple(image.shape[1:])))
            kept = output if output.dim() == 3 and output.requires_grad else None
            source = getattr(given, "grad_fn", None)
            outputs[name, use] = Output(name, use, shape, forms, output.grad_fn, source, kept)

    def passed(start: Tensor) -> Tensor:
        outputs.clear()
        with _seen(model, linked, only):
            return logits_of(model(start))

    start = image.clone().requires_grad_(True).clone()  # a network may work in place, which a leaf forbids
    node, score = start.grad_fn, None
    try:
        with torch.enable_grad():
            logits = passed(start)
        score = (logits * torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)).sum()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation without a gradient
        with torch.no_grad():
            passed(image.clone())
    if score is None or score.grad_fn is None or node not in nodes_of(score.grad_fn):
        score = None
    return Trace(list(outputs.values()), score, node)


@contextmanager
def _seen(model: nn.Module, note: Callable[[str, int, Tensor, Any], None], only: str | None) -> Iterator[None]:
    """While open, pass the output of every module, or of one, to `note`, with its name, the number of the call, and the
    module's first input."""
    calls: dict[str, int] = {}

    def hook_of(name: str) -> Any:
        @own_thread
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            use = calls[name] = calls.get(name, -1) + 1
            tensor = tensor_of(output)
            if tensor is not None and tensor.is_floating_point():
                note(name, use, tensor, args[0] if args else None)

        return hook

    parts = [(name, part) for name, part in model.named_modules() if name and only in (None, name)]
    parts = [(name, part) for name, part in parts if not isinstance(part, torch.jit.ScriptModule)]  # take no hooks
    handles = [part.register_forward_hook(hook_of(name)) for name, part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_by(trace: Trace, outputs: list[Output]) -> dict[tuple[str, int], Tensor | None]:
    """The gradients of the logits with respect to outputs of tokens, by name and call."""
    some = [output for output in outputs if output.tensor is not None and trace.matters(output)]
    if not some or trace.score is None:
        return {}
    tensors = [output.tensor for output in some if output.tensor is not None]
    found = gradients(trace.score, tensors, again=True)
    return {(output.name, output.use): gradient for output, gradient in zip(some, found, strict=True)}


def part_beside(output: Output, form: Form, gradient: Tensor | None) -> Tensor | None:
    """The part of the logits, to first order, that passes through the tokens beside the cells of a form.

    Args:
        output: tokens.
        form: tells the cells from the others.
        gradient: of the logits with respect to the output; None gives None.
    """
    if output.tensor is None or gradient is None:
        return None
    with torch.enable_grad():
        return (output.tensor * form.replaced(gradient, torch.zeros_like(form.to_map(gradient)))).sum()


def reaches(output: Output, form: Form, score: Tensor) -> bool:
    """Whether the cells of an output of tokens change a score."""
    if output.tensor is None:
        return False
    (gradient,) = gradients(score, [output.tensor], again=True)
    return gradient is not None and bool(form.to_map(gradient).any())


def holds_all_values(model: nn.Module, image: Tensor, output: Output, form: Form | None = None) -> bool:
    """Whether the logits stay when the image changes and the output does not; with a form, the cells of its map.

    This also sees paths without a gradient, and what a module returns beside its first tensor.
    """
    other = _unlike(image)
    with torch.no_grad(), _kept(model, output) as kept:
        before = logits_of(model(image.clone())).clone()
    with torch.no_grad():
        changed = logits_of(model(other.clone())).clone()
        held = _logits_with(model, other, output, kept[0], form)
    away = float((changed - before).abs().max())
    return away == 0 or float((held - before).abs().max()) <= 1e-4 * away


def changes_logits(model: nn.Module, image: Tensor, output: Output) -> bool:
    """Whether the logits change when only an output becomes that of another image. It needs no gradient."""
    with torch.no_grad(), _kept(model, output) as kept:
        model(_unlike(image))
    with torch.no_grad():
        before = logits_of(model(image.clone())).clone()
        return not torch.equal(_logits_with(model, image, output, kept[0]), before)


def _unlike(image: Tensor) -> Tensor:
    """Noise within the range of an image."""
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(1)).to(image)
    low, high = torch.aminmax(image)
    return low + (high - low if high > low else 1) * noise


def _logits_with(model: nn.Module, image: Tensor, output: Output, value: Tensor, form: Form | None = None) -> Tensor:
    """The logits of an image with a value in place of an output; with a form, only of the cells of its map."""
    calls = itertools.count()

    @own_thread
    def put(module: nn.Module, args: Any, given: Any) -> Any:
        if next(calls) != output.use:
            return None
        tensor = tensor_of(given)
        if form is None or tensor is None:
            return swapped(given, value.clone())
        return swapped(given, form.replaced(tensor, form.to_map(value)))

    handle = model.get_submodule(output.name).register_forward_hook(put)
    try:
        return logits_of(model(image.clone())).clone()
    finally:
        handle.remove()


class OtherRows(Exception):
    """A layer does not give one row per image."""


def outputs_of(model: nn.Module, images: Tensor, output: Output) -> Tensor:
    """A layer's output for images."""
    found: list[Tensor] = []
    with torch.no_grad():
        for part in torch.split(images, default_batch(images)):
            with _kept(model, output) as kept:
                model(part)
            if not kept or len(kept[-1]) != len(part) or kept[-1].shape[1:] != output.shape:
                raise OtherRows
            found.append(kept[-1])
    return torch.cat(found)


@contextmanager
def _kept(model: nn.Module, output: Output) -> Iterator[list[Tensor]]:
    """While open, for one pass, append the output of this layer to the list."""
    kept: list[Tensor] = []

    def keep(name: str, use: int, tensor: Tensor, given: Any) -> None:
        if use == output.use:
            kept.append(tensor.clone())  # the next layer may work in place

    with _seen(model, keep, output.name):
        yield kept
