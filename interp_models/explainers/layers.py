"""The layer that class activation maps read: how it is found, and how its output holds a feature map.

A wrong layer gives a wrong map without an error. So a layer is taken only if the logits depend on it, no evidence
passes beside it, its output has one row per image, and its cells lie on the image in order (`places.order`).
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from interp_models.core.batches import default_batch
from interp_models.core.classifier import Classifier
from interp_models.core.eager import nodes_of, own_thread
from interp_models.core.errors import InputError, NotApplicable, unknown
from interp_models.core.known import known_of
from interp_models.core.passes import uncounted
from interp_models.core.prepared import class_name
from interp_models.core.protocols import explains_itself
from interp_models.core.scoring import logits_of
from interp_models.explainers.places import EXPLAINED, order
from interp_models.nn.attention import find_transformer, to_map

Reshape = Any
"""Type of the option `reshape`, how a layer's output becomes a feature map (B, C, h, w): `nchw` (as it is), `nhwc`
(from (B, h, w, C)), `tokens` (from (B, T, C)), a function that only moves or drops values, or None to find out."""
KINDS = ("nchw", "nhwc", "tokens")
LayerNames = str | list[str] | None
"""Type of the option `layer`: a dotted name, several, or None to find the last feature map."""
Fuse = Literal["mean", "max"]
"""How the maps of several layers become one."""

MOST_OTHERS = 8
"""Most class, register and distillation tokens beside the tokens of the patches."""
MOST_TRIED = 12
"""Most layers whose cells are tried."""


@dataclass(frozen=True)
class Form:
    """How a layer's output holds a feature map."""

    kind: Literal["nchw", "nhwc", "tokens", "function"]
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of cells, for tokens."""
    prefix: int = 0
    """Number of tokens before those of the cells."""
    suffix: int = 0
    """Number of tokens after those of the cells."""
    function: Callable[[Tensor], Tensor] | None = None

    def to_map(self, output: Tensor) -> Tensor:
        """The output as a feature map (B, C, h, w)."""
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            cells = output[:, self.prefix : output.shape[1] - self.suffix].transpose(1, 2)
            return cells.reshape(*cells.shape[:2], *self.grid)
        return output if self.function is None else self.function(output)

    def replaced(self, output: Tensor, features: Tensor) -> Tensor:
        """The output with the features (B, C, h, w) in place of its own; `output` may be of one image only."""
        if self.kind == "nchw":
            return features.clone()  # the next layer may work in place
        one = output[:1]
        places = self.to_map(torch.arange(one.numel(), device=output.device).view_as(one)).flatten()
        rows = output.flatten(1).expand(len(features), -1).clone()
        return rows.index_copy(1, places, features.flatten(1).to(rows.dtype)).view(-1, *output.shape[1:])


Place = tuple[str, Form, int]
"""Name of a layer's module in the model, form of its output, and number of the call."""


@dataclass(frozen=True)
class Layer:
    """A layer of a network."""

    module: nn.Module
    name: str
    form: Form
    use: int = 0
    """Which call of the module in a forward pass, from 0."""

    def feature_map(self, output: Tensor) -> Tensor:
        """An output of the layer as a feature map (B, C, h, w); the same for a gradient with respect to it.

        Raises:
            InputError: if the form does not fit the output.
        """
        try:
            found = self.form.to_map(output)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            shape = tuple(output.shape)
            raise InputError(f"layer {self.name} gives {shape}, which does not fit reshape= ({error})") from None
        if not isinstance(found, Tensor) or found.dim() != 4 or len(found) != len(output):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"layer {self.name}: the feature map must be (B, C, h, w); reshape= gives {shape}")
        return found


@dataclass
class _Output:
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
class _Trace:
    """The outputs of all modules of a network, in the order in which they are ready."""

    outputs: list[_Output]
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

    def matters(self, output: _Output) -> bool:
        """Whether the logits depend on an output."""
        return self.score is not None and output.node in self.above(self.score.grad_fn)

    def holds_all(self, output: _Output) -> bool:
        """Whether everything that the logits know of the image passes through an output."""
        if self.score is None or not self.matters(output):
            return False
        return self.image not in nodes_of(self.score.grad_fn, without=output.node)

    def passes(self, output: _Output, last: _Output) -> bool:
        """Whether all that the logits read of an output passes through a later one."""
        if self.score is None or output.node is None or last.node is None:
            return False
        return output.node in self.above(last.node) and output.node not in nodes_of(self.score.grad_fn, last.node)

    def feeds_all(self, output: _Output) -> bool:
        """Whether everything that the logits know of the image passes through what the module was given."""
        if self.score is None or output.source is None or not self.matters(output):
            return False
        return self.image not in nodes_of(self.score.grad_fn, without=output.source)


def target_layer(model: nn.Module, layer: str | None, inputs: Tensor, reshape: Reshape = None) -> Layer:
    """Find the layer that class activation maps read, and the form of its output.

    Without a name it is, in this order: the `feature_layer` of a model that explains itself; the input of the last
    attention of timm's vision transformer; or the last layer that fulfils all conditions of this module. A layer of
    tokens beside which the class token passes must be a normalisation, as the input of the last attention is.

    The result is cached by the model's modules and the size of the images. The search takes passes of a few images.

    Args:
        model: the model, in eval mode.
        layer: dotted name of a submodule; None searches for it.
        inputs: images (B, C, H, W).
        reshape: form of the layer's output; None finds out. It needs a name.

    Raises:
        InputError: if the named layer does not exist, or does not give a feature map.
        NotApplicable: if the search finds no layer, or the network uses the layer several times side by side.
    """
    image = inputs[:1].detach()
    if explains_itself(model) and layer is None:
        return _own(model, image)
    key = (layer, reshape, tuple(image.shape[1:]))
    known = {} if callable(reshape) else known_of(model)  # a function may hold the model
    if key not in known:
        with uncounted(), torch.inference_mode(False):
            known[key] = _found(model, image.clone()) if layer is None else _named(model, layer, image.clone(), reshape)
    name, form, use = known[key]
    return Layer(model.get_submodule(name), name, form, use)


def stages(model: nn.Module, inputs: Tensor) -> list[Layer]:
    """Find the last feature map of every resolution, the finest first.

    These are the inputs of the layers that reduce the resolution, and the last feature map: outputs (B, C, h, w) or
    (B, h, w, C) whose cells lie on the image in order, and through which passes everything that the logits know of the
    image. A resolution at which no layer has weights, as after a last pooling, has none. If there are no such outputs,
    and in timm's vision transformers, the only one is `target_layer`.

    The result is cached as that of `target_layer`.
    """
    if find_transformer(model) is not None:
        return [target_layer(model, None, inputs)]
    known, key = known_of(model), ("stages", tuple(inputs.shape[1:]))
    if key not in known:
        with uncounted(), torch.inference_mode(False):
            known[key] = _stages(model, inputs[:1].detach().clone())
    found = [Layer(model.get_submodule(name), name, form, use) for name, form, use in known[key]]
    return found or [target_layer(model, None, inputs)]


def _stages(model: nn.Module, image: Tensor) -> list[Place]:
    trace = _traced(model, image)
    whole: dict[tuple[int, int], list[tuple[_Output, Form]]] = {}
    weighted: set[tuple[int, int]] = set()
    for output in trace.outputs:
        for form in output.forms if len(output.shape) == 3 else ():
            grid = _grid(form, output.shape)
            if list(model.get_submodule(output.name).parameters(recurse=False)):
                weighted.add(grid)
            if trace.holds_all(output):
                whole.setdefault(grid, []).append((output, form))
    found: list[Place] = []
    cells = math.inf
    for grid, outputs in whole.items():
        if grid not in weighted or math.prod(grid) >= cells:
            continue
        lying = (pair for pair in outputs[:-3:-1] if _form(model, image, pair[0], [pair[1]]) is not None)
        if (last := next(lying, None)) is not None:
            cells = math.prod(grid)
            found.append((last[0].name, last[1], last[0].use))
    return found


def check_transformer(model: nn.Module, vit: Any, inputs: Tensor) -> None:
    """Raise `NotApplicable` unless a prediction is made by the class token of a timm vision transformer, which is used
    once, without other parts beside it, and whose patches lie on the image in order.

    The result is cached as that of `target_layer`.
    """
    known, key = known_of(model), ("transformer", id(vit), tuple(inputs.shape[1:]))
    if key not in known:
        with uncounted(), torch.inference_mode(False):
            known[key] = _why_not(model, vit, inputs[:1].detach().clone())
    if known[key] is not None:
        raise NotApplicable(known[key])


def _why_not(model: nn.Module, vit: Any, image: Tensor) -> str | None:
    """Why methods of a timm vision transformer cannot explain a model; None if they can."""
    name, size = class_name(model), (image.shape[2], image.shape[3])
    last = next(name for name, part in model.named_modules() if part is vit.blocks[-1])
    trace = _traced(model, image, only=last)
    if len(trace.outputs) != 1:
        return f"the transformer ran {len(trace.outputs)} times for one prediction; expected once"
    if trace.score is None:
        return f"no gradient flows through {name}, so that it cannot be told what it reads of its transformer"
    output = trace.outputs[0]
    if not trace.holds_all(output):
        return f"{name} does not predict by one transformer alone, but also by parts beside it"
    if explains_itself(model):
        return None
    gradient = None
    if output.tensor is not None:
        (gradient,) = torch.autograd.grad(trace.score, output.tensor, allow_unused=True, retain_graph=True)
    if gradient is None or not bool(gradient[:, 0].any()) or bool(gradient[:, vit.num_prefix_tokens :].any()):
        return f"{name} does not predict by the class token of its transformer alone"
    entered: list[Tensor] = []

    def enters(module: nn.Module, args: Any) -> None:
        entered.append(args[0])

    def read(images: Tensor) -> Tensor:
        handle = vit.blocks[-1].register_forward_pre_hook(own_thread(enters))
        try:
            with torch.no_grad():
                for part in torch.split(images, default_batch(images)):
                    model(part)
        finally:
            handle.remove()
        tokens = torch.cat(entered)
        entered.clear()
        return to_map(vit, tokens, size)

    grid = tuple(read(image).shape[2:])
    if (share := order(image, (grid[0], grid[1]), read)) is not None and share < EXPLAINED:
        return f"the patches of {name}'s transformer do not lie on the image in order"
    return None


def _own(model: Any, image: Tensor) -> Layer:
    """The feature layer of a model that explains itself."""
    vit, module = find_transformer(model), model.feature_layer
    form = Form("nchw") if vit is None else _patches(vit, (image.shape[2], image.shape[3]))
    return Layer(module, "feature_layer", form)


def _found(model: nn.Module, image: Tensor) -> Place:
    vit = find_transformer(model)
    if vit is not None and _reads_class_token(vit) and _why_not(model, vit, image) is None:
        name = next(name for name, part in model.named_modules() if part is vit.blocks[-1].norm1)
        return name, _patches(vit, (image.shape[2], image.shape[3])), 0  # later, only the class token has a gradient
    return _last(model, image, _traced(model, image))


def _reads_class_token(vit: Any) -> bool:
    """Whether it is timm's `VisionTransformer` with blocks that normalise before attention, read by its class token."""
    known = any(kind.__name__ == "VisionTransformer" for kind in type(vit).__mro__)
    block = type(vit.blocks[-1]).__name__ == "Block"
    return known and block and getattr(vit, "cls_token", None) is not None and vit.global_pool in ("token", "")


def _last(model: nn.Module, image: Tensor, trace: _Trace) -> Place:
    """The last output that fulfils all conditions."""
    name = class_name(model)
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in model.modules())
    outputs = [] if scripted else [output for output in reversed(trace.outputs) if output.forms]
    reached = _reached(trace, outputs)
    tried, passed_over = 0, ""
    for output in outputs:
        module = model.get_submodule(output.name)
        if output.shape == tuple(image.shape[1:]) and not any(x.dim() == 4 for x in module.parameters()):
            continue  # the image itself, normalised
        # Beside the patches, the class token passes the last attention by the residual connection.
        norm = "norm" in type(module).__name__.lower() and len(output.shape) == 2
        whole = trace.score is None or trace.holds_all(output)
        if not (_holds_all_values(model, image, output) if whole else norm and trace.feeds_all(output)):
            continue
        if (tried := tried + 1) > MOST_TRIED:
            break
        form = _form(model, image, output, output.forms)
        if form is None:
            passed_over = passed_over or (output.name if any(form.kind == "nchw" for form in output.forms) else "")
            continue
        if form.kind == "tokens" and trace.score is not None:
            gradient = reached.get((output.name, output.use))
            if gradient is None or not bool(form.to_map(gradient).any()):
                continue  # in the last layers, often only the class token reaches the logits
        if passed_over and passed_over not in output.name:
            warnings.warn(
                f"layer {output.name} of {name} is read: in the later {passed_over} no map lies on the image in order",
                stacklevel=2,
            )
        return output.name, form, output.use
    uses = {output.name: output.use + 1 for output in trace.outputs if output.forms}
    often = [part for part, count in uses.items() if count > 1]
    why = "; parts made by torch.jit cannot be read" if scripted else ""
    if trace.score is None and not scripted:
        why = "; no gradient flows through it"
    elif often:
        why = f"; {often[-1]} is passed {uses[often[-1]]} times for one prediction"
    raise NotApplicable(
        f"no layer of {name} holds all that the logits know of the image, in a map whose cells lie on the image in "
        f"order{why}; name a layer with layer="
    )


def _reached(trace: _Trace, outputs: list[_Output]) -> dict[tuple[str, int], Tensor | None]:
    """The gradients of the logits by outputs of tokens."""
    some = [output for output in outputs if output.tensor is not None and trace.matters(output)]
    if not some or trace.score is None:
        return {}
    tensors = [output.tensor for output in some if output.tensor is not None]
    gradients = torch.autograd.grad(trace.score, tensors, allow_unused=True, retain_graph=True)
    return {(output.name, output.use): gradient for output, gradient in zip(some, gradients, strict=True)}


def _form(model: nn.Module, image: Tensor, output: _Output, forms: list[Form], least: float = EXPLAINED) -> Form | None:
    """The form whose cells lie best on the image in order; None if they lie worse than `least` in all forms.

    A map that does not change at all tells nothing. Then it must have channels first, and the image's aspect ratio.
    """
    outputs: dict[Any, Tensor] = {}
    best: tuple[float, Form | None] = (least, None)
    for form in forms:
        grid, calls = _grid(form, output.shape), itertools.count()

        def read(images: Tensor, form: Form = form, grid: Any = grid, calls: Iterator[int] = calls) -> Tensor:
            key = (grid, next(calls))  # forms of one grid are tried with the same images
            if key not in outputs:
                outputs[key] = _outputs(model, images, output)
            return form.to_map(outputs[key])

        try:
            share = order(image, grid, read)
        except _OtherRows:
            return None
        if share is None and form.kind == "nchw" and _fits(grid, (image.shape[2], image.shape[3])):
            return form
        if share is not None and share >= best[0]:
            best = (share, form)
            if form.kind == "nchw":
                break
    return best[1]


class _OtherRows(Exception):
    """A layer does not give one row per image."""


def _outputs(model: nn.Module, images: Tensor, output: _Output) -> Tensor:
    """A layer's output for images."""
    kept: list[Tensor] = []

    def keep(name: str, use: int, tensor: Tensor, given: Any) -> None:
        if use == output.use:
            kept.append(tensor.clone())  # the next layer may work in place

    with torch.no_grad():
        for part in torch.split(images, default_batch(images)):
            with _seen(model, keep, output.name):
                model(part)
            if not kept or len(kept[-1]) != len(part) or kept[-1].shape[1:] != output.shape:
                raise _OtherRows
    return torch.cat(kept)


def _grid(form: Form, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the map in an output of this shape per image."""
    return form.grid if form.kind == "tokens" else (shape[0], shape[1]) if form.kind == "nhwc" else (shape[1], shape[2])


def _named(model: nn.Module, layer: str, image: Tensor, reshape: Reshape) -> Place:
    outer = "network." if isinstance(model, Classifier) else ""  # the user knows the network's names
    parts = {
        name.removeprefix(outer): part
        for name, part in model.named_modules(remove_duplicate=False)
        if name.startswith(outer) and name.removeprefix(outer)
    }
    if layer not in parts:
        raise unknown("layer", layer, list(parts))
    name = next(name for name, part in model.named_modules() if part is parts[layer])  # `layer` may be another name
    trace = _traced(model, image, only=name)
    if not trace.outputs:
        raise InputError(f"layer {layer} was not used in the forward pass, or gives no tensor with one row per image")
    last, count = trace.outputs[-1], len(trace.outputs)
    if count > 1 and not all(trace.passes(one, last) for one in trace.outputs[:-1]):
        raise NotApplicable(
            f"layer {layer} is passed {count} times for one prediction, and the logits read more than the last"
        )
    if trace.score is not None and last.node is not None and not trace.matters(last):
        raise NotApplicable(f"the logits do not depend on layer {layer}")
    if callable(reshape):
        return name, Form("function", function=reshape), last.use
    size = (image.shape[2], image.shape[3])
    if (vit := find_transformer(model)) is not None and reshape in (None, "tokens") and len(last.shape) == 2:
        return name, _patches(vit, size), last.use
    if reshape is None:
        form = _form(model, image, last, last.forms)
    else:
        form = _form(model, image, last, [form for form in last.forms if form.kind == reshape], least=-1)
    if form is None:
        raise InputError(
            f"layer {layer} gives no feature map (B, C, h, w) whose cells lie on an image of {size[0]} × {size[1]} in "
            f"order; it gives {last.shape} per image. Name another layer, or say how the cells lie with reshape="
        )
    return name, form, last.use


def _patches(vit: Any, size: tuple[int, int]) -> Form:
    """The form of a timm vision transformer's tokens, for images of a size."""
    known = ref(vit)  # a form is cached as long as the model lives, which it must not keep alive
    return Form("function", function=lambda tokens: to_map(known(), tokens, size))


def _traced(model: nn.Module, image: Tensor, only: str | None = None) -> _Trace:
    """Trace the outputs of all modules, or only of one, for an image."""
    outputs: dict[tuple[str, int], _Output] = {}

    def linked(name: str, use: int, output: Tensor, given: Any) -> None:
        if len(output) == 1 and output.dim() > 1:
            shape = tuple(output.shape[1:])
            forms = list(_forms(shape, tuple(image.shape[1:])))
            kept = output if output.dim() == 3 and output.requires_grad else None
            source = getattr(given, "grad_fn", None)
            outputs[name, use] = _Output(name, use, shape, forms, output.grad_fn, source, kept)

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
    return _Trace(list(outputs.values()), score, node)


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


def tensor_of(output: Any) -> Tensor | None:
    """A module's output, or the first of several; None if it is no tensor."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def _forms(shape: tuple[int, ...], image: tuple[int, ...]) -> Iterator[Form]:
    """The forms of a feature map that are possible for an output of this shape, for an image (C, H, W)."""
    _, height, width = image
    if len(shape) == 3:
        (h, w), last = shape[1:], shape[:2]
        if h * w > 1 and h <= height and w <= width:
            yield Form("nchw")
        if last[0] * last[1] > 1 and last[0] <= height and last[1] <= width and _fits(last, (height, width)):
            yield Form("nhwc")
    if len(shape) == 2:
        for others in range(min(MOST_OTHERS, shape[0] - 2) + 1):
            cells = shape[0] - others
            h = round((cells * height / width) ** 0.5)
            if others < cells and h and cells % h == 0 and _fits((h, cells // h), (height, width)):
                for suffix in range(others + 1):
                    yield Form("tokens", (h, cells // h), others - suffix, suffix)


def _fits(grid: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether a grid has the image's aspect ratio, up to one cell."""
    (height, width), (h, w) = size, grid
    return (h - 1) * width <= (w + 1) * height and (w - 1) * height <= (h + 1) * width


def _holds_all_values(model: nn.Module, image: Tensor, output: _Output) -> bool:
    """Whether the logits stay when the image changes and the output does not.

    This also sees paths without a gradient, and what a module returns beside its first tensor.
    """
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(1)).to(image)
    low, high = torch.aminmax(image)
    other = low + (high - low if high > low else 1) * noise
    kept: list[Tensor] = []

    def keep(name: str, use: int, tensor: Tensor, given: Any) -> None:
        if use == output.use:
            kept.append(tensor.clone())

    with torch.no_grad(), _seen(model, keep, output.name):
        before = logits_of(model(image.clone())).clone()
    calls = itertools.count()

    @own_thread
    def put(module: nn.Module, args: Any, given: Any) -> Any:
        return swapped(given, kept[0].clone()) if next(calls) == output.use else None

    with torch.no_grad():
        changed = logits_of(model(other.clone())).clone()
        handle = model.get_submodule(output.name).register_forward_hook(put)
        try:
            held = logits_of(model(other.clone()))
        finally:
            handle.remove()
    away = float((changed - before).abs().max())
    return away == 0 or float((held - before).abs().max()) <= 1e-4 * away


def swapped(output: Any, tensor: Tensor) -> Any:
    """A module's output with another tensor in the place that `tensor_of` reads."""
    if not isinstance(output, tuple | list):
        return tensor
    others = [tensor, *output[1:]]
    return type(output)(*others) if hasattr(output, "_fields") else type(output)(others)
