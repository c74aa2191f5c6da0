"""The layer that class activation maps read: how it is found, and how its output holds a feature map.

A wrong layer gives a wrong map without an error. So a layer is taken only if the logits depend on it, no evidence
passes beside it, its output has one row per image, and its cells lie on the image in order. The last point is tried:
noise in one quarter of an image must change that quarter of the map most.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn

from interp_models.core.classifier import Classifier
from interp_models.core.eager import nodes_of
from interp_models.core.errors import InputError, NotApplicable, unknown
from interp_models.core.known import known_of
from interp_models.core.passes import uncounted
from interp_models.core.prepared import class_name
from interp_models.core.scoring import explains_itself, logits_of
from interp_models.nn.attention import find_transformer, to_map

Reshape = Any
"""Type of the option `reshape`, how a layer's output becomes a feature map (B, C, h, w): `nchw` (as it is), `nhwc`
(from (B, h, w, C)), `tokens` (from (B, T, C)), a function that only moves or drops values, or None to find out."""
KINDS = ("nchw", "nhwc", "tokens")
LayerNames = str | list[str] | None
"""Type of the option `layer`: a dotted name, several, or None to find the last feature map."""
Fuse = Literal["mean", "max"]
"""How the maps of several layers become one."""

MOST_PREFIX = 8
"""Most class, register and distillation tokens before the tokens of the patches."""
DRAWS, MARGIN = 2, 0.1
"""Draws of noise per quarter, and least advantage, as a logarithm, of the right order of quarters over others."""
MOST_HELD = 12
"""Most layers to try if the network's graph cannot be read."""


@dataclass(frozen=True)
class Form:
    """How a layer's output holds a feature map."""

    kind: Literal["nchw", "nhwc", "tokens", "function"]
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of cells, for tokens."""
    prefix: int = 0
    """Number of tokens before those of the cells."""
    function: Callable[[Tensor], Tensor] | None = None

    def to_map(self, output: Tensor) -> Tensor:
        """The output as a feature map (B, C, h, w)."""
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            cells = output[:, self.prefix :].transpose(1, 2)
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
    forms: list[tuple[Form, bool | None]]
    """Forms of a feature map that its shape allows; whether the cells lie on the image, None if that cannot be told."""
    node: Any = None
    """Its node of the autograd graph; None if it has none."""
    source: Any = None
    """The node of the module's input."""
    tensor: Tensor | None = None
    """The tokens of one image, with their graph."""

    @property
    def form(self) -> Form | None:
        """The form whose cells lie on the image; None if there is none."""
        return next((form for form, lies in self.forms if lies), None)


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
    by_size: dict[tuple[int, ...], list[_Output]] = {}
    weighted: set[tuple[int, ...]] = set()
    for output in trace.outputs:
        if output.form is None or output.form.kind not in ("nchw", "nhwc"):
            continue
        grid = output.shape[1:] if output.form.kind == "nchw" else output.shape[:2]
        by_size.setdefault(grid, []).append(output)
        if list(model.get_submodule(output.name).parameters(recurse=False)):
            weighted.add(grid)
    found: list[Place] = []
    cells = math.inf
    for grid, outputs in by_size.items():
        last = next((output for output in reversed(outputs) if trace.holds_all(output)), None)
        if grid in weighted and last is not None and last.form is not None and math.prod(grid) < cells:
            cells = math.prod(grid)
            found.append((last.name, last.form, last.use))
    return found


def check_transformer(model: nn.Module, vit: Any, inputs: Tensor) -> None:
    """Raise `NotApplicable` if a prediction uses a timm vision transformer several times, or other parts beside it.

    The result is cached as that of `target_layer`.
    """
    known, key = known_of(model), ("transformer", id(vit), tuple(inputs.shape[1:]))
    if key not in known:
        last = next(name for name, part in model.named_modules() if part is vit.blocks[-1])
        with uncounted(), torch.inference_mode(False):
            trace = _traced(model, inputs[:1].detach().clone(), only=last)
        known[key] = len(trace.outputs), trace.score is None or all(trace.holds_all(one) for one in trace.outputs)
    times, whole = known[key]
    if times != 1:
        raise NotApplicable(f"the transformer ran {times} times for one prediction; expected once")
    if not whole:
        raise NotApplicable(
            f"{class_name(model)} does not predict by one transformer alone, but also by parts beside it"
        )


def _own(model: Any, image: Tensor) -> Layer:
    """The feature layer of a model that explains itself."""
    vit, module = find_transformer(model), model.feature_layer
    form = Form("nchw") if vit is None else _patches(vit, (image.shape[2], image.shape[3]))
    return Layer(module, "feature_layer", form)


def _found(model: nn.Module, image: Tensor) -> Place:
    vit = find_transformer(model)
    if vit is not None and _reads_class_token(vit) and _ran(model, vit, image):
        check_transformer(model, vit, image)
        name = next(name for name, part in model.named_modules() if part is vit.blocks[-1].norm1)
        return name, _patches(vit, (image.shape[2], image.shape[3])), 0  # later, only the class token has a gradient
    chosen = _last(model, image, _traced(model, image))
    assert chosen.form is not None
    return chosen.name, chosen.form, chosen.use


def _reads_class_token(vit: Any) -> bool:
    """Whether it is timm's `VisionTransformer` with blocks that normalise before attention, read by its class token."""
    known = any(kind.__name__ == "VisionTransformer" for kind in type(vit).__mro__)
    block = type(vit.blocks[-1]).__name__ == "Block"
    return known and block and getattr(vit, "cls_token", None) is not None and vit.global_pool in ("token", "")


def _ran(model: nn.Module, vit: Any, image: Tensor) -> bool:
    """Whether a prediction uses a part of the model at all."""
    name = next(name for name, part in model.named_modules() if part is vit.blocks[-1])
    return bool(_traced(model, image, only=name).outputs)


def _last(model: nn.Module, image: Tensor, trace: _Trace) -> _Output:
    """The last output that fulfils all conditions."""
    name = class_name(model)
    fitting = [output for output in trace.outputs if output.form is not None]
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in model.modules())
    if not fitting or scripted:
        why = "; parts made by torch.jit cannot be read" if scripted else ""
        raise NotApplicable(
            f"no layer of {name} gives a feature map whose cells lie on the image{why}; name one with layer="
        )
    if trace.score is None:
        for output in fitting[: -MOST_HELD - 1 : -1]:
            if _holds_all_values(model, image, output):
                return output
        raise NotApplicable(
            f"no gradient flows through {name}, and none of its last layers holds all that the logits know of the "
            "image; name a layer with layer="
        )
    read = _cells_read(trace, fitting)
    for output in reversed(fitting):
        form, module = output.form, model.get_submodule(output.name)
        assert form is not None
        tokens = form.kind == "tokens"
        if not trace.matters(output) or (tokens and (output.name, output.use) not in read):
            continue
        if output.shape == tuple(image.shape[1:]) and not any(x.dim() == 4 for x in module.parameters()):
            continue  # the image itself, normalised
        if trace.holds_all(output) and _holds_all_values(model, image, output):
            return output
        # Beside the patches, the class token passes the last attention by the residual connection.
        if tokens and "norm" in type(module).__name__.lower() and trace.feeds_all(output):
            return output
    uses = {output.name: output.use + 1 for output in trace.outputs if output.forms}
    often = [part for part, count in uses.items() if count > 1]
    why = f" ({often[-1]} is passed {uses[often[-1]]} times for one prediction)" if often else ""
    raise NotApplicable(
        f"no layer of {name} holds all that the logits know of the image{why}; name a layer with layer="
    )


def _cells_read(trace: _Trace, outputs: Iterable[_Output]) -> set[tuple[str, int]]:
    """The outputs of tokens whose cells reach the logits; in the last layers, often only the class token does."""
    some = [output for output in outputs if output.tensor is not None and trace.matters(output)]
    tensors = [output.tensor for output in some if output.tensor is not None]
    if not some or trace.score is None:
        return set()
    gradients = torch.autograd.grad(trace.score, tensors, allow_unused=True)
    found = set()
    for output, gradient in zip(some, gradients, strict=True):
        if output.form is not None and gradient is not None and bool(output.form.to_map(gradient).any()):
            found.add((output.name, output.use))
    return found


def _named(model: nn.Module, layer: str, image: Tensor, reshape: Reshape) -> Place:
    outer = "network." if isinstance(model, Classifier) else ""  # the user knows the network's names
    names = [name.removeprefix(outer) for name, _ in model.named_modules() if name.startswith(outer) and name != outer]
    names = [name for name in names if name and (not outer or name != "network")]
    if layer not in names:
        raise unknown("layer", layer, names)
    name = f"{outer}{layer}"
    size = (image.shape[2], image.shape[3])
    trace = _traced(model, image, only=name)
    if not trace.outputs:
        raise InputError(f"layer {layer} was not used in the forward pass, or gives no tensor with one row per image")
    last, count = trace.outputs[-1], len(trace.outputs)
    in_a_row = last.node is not None and all(one.node in trace.above(last.node) for one in trace.outputs)
    if count > 1 and not in_a_row:
        raise NotApplicable(f"layer {layer} is passed {count} times side by side for one prediction, not once")
    if trace.score is not None and last.node is not None and not trace.matters(last):
        raise NotApplicable(f"the logits do not depend on layer {layer}")
    if callable(reshape):
        return name, Form("function", function=reshape), last.use
    if (vit := find_transformer(model)) is not None and reshape in (None, "tokens") and len(last.shape) == 2:
        return name, _patches(vit, size), last.use
    allowed = [form for form, lies in last.forms if lies and reshape is None]
    allowed += [form for form, _ in sorted(last.forms, key=lambda pair: not pair[1]) if form.kind == reshape]
    if not allowed:
        raise InputError(
            f"layer {layer} gives no feature map (B, C, h, w) whose cells lie on an image of {size[0]} × {size[1]} in "
            f"order; it gives {last.shape} per image. Name another layer, or say how the cells lie with reshape="
        )
    return name, allowed[0], last.use


def _patches(vit: Any, size: tuple[int, int]) -> Form:
    """The form of a timm vision transformer's tokens, for images of a size."""
    known = ref(vit)  # a form is cached as long as the model lives, which it must not keep alive
    return Form("function", function=lambda tokens: to_map(known(), tokens, size))


def _traced(model: nn.Module, image: Tensor, only: str | None = None) -> _Trace:
    """Trace the outputs of all modules, or only of one, that have a row per image."""
    probes = _probes(image)
    outputs: dict[tuple[str, int], _Output] = {}

    def probed(name: str, use: int, output: Tensor, given: Any) -> None:
        if len(output) == len(probes) and output.dim() > 1:
            shape = tuple(output.shape[1:])
            forms = [(form, _lies(form.to_map(output), probes)) for form in _forms(shape, tuple(image.shape[1:]))]
            if output.dim() == 4:  # a map of zeros tells nothing; its sides must do
                fits = _fits(shape[1:], (image.shape[2], image.shape[3]))
                forms = [(form, fits if lies is None and form.kind == "nchw" else bool(lies)) for form, lies in forms]
            outputs[name, use] = _Output(name, use, shape, [(form, bool(lies)) for form, lies in forms])

    with torch.no_grad(), _seen(model, probed, only):
        model(probes)

    def linked(name: str, use: int, output: Tensor, given: Any) -> None:
        if (name, use) in outputs:
            one = outputs[name, use]
            one.node, one.source = output.grad_fn, getattr(given, "grad_fn", None)
            if one.form is not None and one.form.kind == "tokens" and output.requires_grad:
                one.tensor = output

    start = image.clone().requires_grad_(True).clone()  # a network may work in place, which a leaf forbids
    node, score = start.grad_fn, None
    try:
        with torch.enable_grad(), _seen(model, linked, only):
            logits = logits_of(model(start))
        score = (logits * torch.linspace(1, 2, logits.shape[1], device=logits.device, dtype=logits.dtype)).sum()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation without a gradient
        score = None
    if score is None or score.grad_fn is None or node not in nodes_of(score.grad_fn):
        score = None
    return _Trace(list(outputs.values()), score, node)


@contextmanager
def _seen(model: nn.Module, note: Callable[[str, int, Tensor, Any], None], only: str | None) -> Iterator[None]:
    """While open, pass the output of every module, or of one, to `note`, with its name, the number of the call, and the
    module's first input."""
    calls: dict[str, int] = {}

    def hook_of(name: str) -> Any:
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
        if h * w > 1 and last[0] * last[1] > 1 and last[0] <= height and last[1] <= width:
            yield Form("nhwc")
    if len(shape) == 2:
        for prefix in range(min(MOST_PREFIX, shape[0] - 2) + 1):
            cells = shape[0] - prefix
            h = round((cells * height / width) ** 0.5)
            if h and cells % h == 0 and _fits((h, cells // h), (height, width)):
                yield Form("tokens", (h, cells // h), prefix)


def _fits(grid: tuple[int, ...], size: tuple[int, ...]) -> bool:
    """Whether a grid has the image's aspect ratio, up to one cell."""
    (height, width), (h, w) = size, grid
    return (h - 1) * width <= (w + 1) * height and (w - 1) * height <= (h + 1) * width


def _halves(side: int) -> list[slice]:
    """The halves of a side; a side of one cell is whole."""
    return [slice(side // 2), slice(side - side // 2, side)] if side > 1 else [slice(1)]


def _quarters(size: Sequence[int]) -> list[tuple[slice, ...]]:
    """The quarters of an image or a map: halves of both sides, or four parts of a line of at least four cells."""
    if min(size) == 1 and max(size) >= 4:
        ends = [round(place * max(size) / 4) for place in range(5)]
        line = [slice(*pair) for pair in itertools.pairwise(ends)]
        return [(slice(1), part) if size[0] == 1 else (part, slice(1)) for part in line]
    return list(itertools.product(*map(_halves, size)))


def _probes(image: Tensor) -> Tensor:
    """An image, and copies of it with noise in one quarter each, `DRAWS` times."""
    low, high = (float(value) for value in torch.aminmax(image))
    low, high = (low, high) if low < high else (0.0, 1.0)
    quarters, generator = _quarters(image.shape[2:]), torch.Generator().manual_seed(0)
    probes = image.repeat(1 + DRAWS * len(quarters), 1, 1, 1)
    for number, probe in enumerate(probes[1:]):
        noise = torch.rand(image.shape[1:], generator=generator).to(image)
        place = (slice(None), *quarters[number % len(quarters)])
        probe[place] = (low + (high - low) * noise)[place]
    return probes


def _lies(features: Tensor, probes: Tensor) -> bool | None:
    """Whether noise in a quarter of the image changes the same quarter of a feature map most; None if nothing changes.

    Some cells change more than others, and cells see more than one quarter. So the way to assign quarters of the image
    to quarters of the map is sought whose changes have the highest product. It must leave all in place, by `MARGIN`.
    """
    change = (features[1:] - features[:1]).detach().abs().float().mean(dim=1)
    if float(change.max()) <= 1e-6 * float(features.detach().abs().max()):
        return None
    parts, seen = _quarters(change.shape[1:]), _quarters(probes.shape[2:])
    means = torch.stack([change[:, rows, columns].mean(dim=(1, 2)) for rows, columns in parts], dim=1)
    means = means.view(DRAWS, len(seen), len(parts)).mean(dim=0)
    if min(change.shape[1:]) == 1 < min(probes.shape[2:]):  # a map of one row or column sees both halves across it
        means = means.view(2, 2, len(parts)).mean(dim=1 if change.shape[2] == 1 else 0)
        means = means.view(2, 2, -1).mean(dim=2)
    if means.shape[0] != means.shape[1]:
        return None
    logs = (means + 1e-3 * means.mean()).log().tolist()
    count = range(len(logs))
    sums = {order: sum(logs[q][order[q]] for q in count) for order in itertools.permutations(count)}
    own = sums.pop(tuple(count))
    return bool(own > max(sums.values(), default=-math.inf) + MARGIN)


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
