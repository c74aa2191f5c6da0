"""The search for the layer that class activation maps read.

A wrong layer gives a wrong map without an error. So a layer is taken only if the logits depend on it, no evidence
bypasses it, its output has one row per image, and its cells keep their positions in the image (`places.order`).
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.classifier import Classifier
from interp_models.core.errors import InputError, NotApplicable, first_line, unknown
from interp_models.core.known import known_of
from interp_models.core.passes import uncounted
from interp_models.core.prepared import class_name
from interp_models.core.protocols import explains_itself
from interp_models.explainers.bias_places import ORDERED_AT_ALL
from interp_models.explainers.class_token import reads_class_token, why_not
from interp_models.explainers.forms import MOST_OTHERS, Form, Reshape, fits, patches
from interp_models.explainers.places import EXPLAINED, order, replayed
from interp_models.explainers.traces import (
    OtherRows,
    Output,
    Trace,
    changes_logits,
    gradients_by,
    holds_all_values,
    outputs_of,
    part_beside,
    reaches,
    traced,
)
from interp_models.nn.attention import find_transformer

MOST_TRIED = 12
"""Most layers whose cells are tried."""

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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's function may raise anything
            why = f"layer {self.name} gives {tuple(output.shape)}, which does not fit reshape= ({first_line(error)})"
            raise InputError(why) from None
        if not isinstance(found, Tensor) or found.dim() != 4 or len(found) != len(output):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"layer {self.name}: the feature map must be (B, C, h, w); reshape= gives {shape}")
        return found


def target_layer(model: nn.Module, layer: str | None, inputs: Tensor, reshape: Reshape = None) -> Layer:
    """Find the layer that class activation maps read, and the form of its output.

    Without a name it is, in this order: the `feature_layer` of a model that explains itself; the input of the last
    attention of timm's vision transformer; or the last layer that meets all conditions of this module. If the class
    token bypasses the patch tokens, only a normalisation layer is accepted, such as the one before the last attention.

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
    (B, h, w, C) whose cells keep their positions in the image, and that all evidence passes through. Resolutions at
    which no layer has weights, as after a last pooling, are left out. Two kinds of networks have `target_layer` only:
    timm's vision transformers and, with a warning, those without such outputs, as networks without gradients.

    The result is cached as that of `target_layer`.
    """
    if find_transformer(model) is not None:
        return [target_layer(model, None, inputs)]
    known, key = known_of(model), ("stages", tuple(inputs.shape[1:]))
    if key not in known:
        with uncounted(), torch.inference_mode(False):
            known[key] = _stages(model, inputs[:1].detach().clone())
    found = [Layer(model.get_submodule(name), name, form, use) for name, form, use in known[key]]
    if found:
        return found
    last = target_layer(model, None, inputs)
    warnings.warn(
        f"using only layer {last.name} of {class_name(model)}: it is not shown that all evidence passes through layers "
        "of other resolutions",
        stacklevel=2,
    )
    return [last]


def _stages(model: nn.Module, image: Tensor) -> list[Place]:
    trace = traced(model, image)
    whole: dict[tuple[int, int], list[tuple[Output, Form]]] = {}
    weighted: set[tuple[int, int]] = set()
    for output in trace.outputs:
        for form in output.forms if len(output.shape) == 3 else ():
            grid = form.cells(output.shape)
            if list(model.get_submodule(output.name).parameters(recurse=False)):
                weighted.add(grid)
            if trace.holds_all(output):
                whole.setdefault(grid, []).append((output, form))
    found: list[Place] = []
    cells = math.inf
    for grid, outputs in whole.items():
        if grid not in weighted or math.prod(grid) >= cells:
            continue
        lying = (
            (output, form)
            for output, form in outputs[:-3:-1]
            if holds_all_values(model, image, output) and _form(model, image, output, [form]) is not None
        )
        if (last := next(lying, None)) is not None:
            cells = math.prod(grid)
            found.append((last[0].name, last[1], last[0].use))
    return found


def _own(model: Any, image: Tensor) -> Layer:
    """The feature layer of a model that explains itself."""
    vit, module = find_transformer(model), model.feature_layer
    if vit is None:
        return Layer(module, "feature_layer", Form("nchw"))
    tokens = patches(vit, (image.shape[2], image.shape[3]))
    form = Form("function", function=lambda output: tokens.to_map(output) if output.dim() == 3 else output)
    return Layer(module, "feature_layer", form)


def _found(model: nn.Module, image: Tensor) -> Place:
    vit = find_transformer(model)
    if vit is not None and reads_class_token(vit) and why_not(model, vit, image) is None:
        name = next(name for name, part in model.named_modules() if part is vit.blocks[-1].norm1)
        return name, patches(vit, (image.shape[2], image.shape[3])), 0  # later, only the class token has a gradient
    return _last(model, image, traced(model, image))


def _last(model: nn.Module, image: Tensor, trace: Trace) -> Place:
    """The last output that meets all conditions."""
    name = class_name(model)
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in model.modules())
    outputs = [] if scripted else [output for output in reversed(trace.outputs) if output.forms]
    reached = gradients_by(trace, outputs)
    tried, passed_over = 0, ""
    beside: Tensor | None = None
    for output in outputs:
        module = model.get_submodule(output.name)
        if output.shape == tuple(image.shape[1:]) and not any(x.dim() == 4 for x in module.parameters()):
            continue  # the image itself, normalised
        gradient = reached.get((output.name, output.use))
        if gradient is not None and len(output.shape) == 2:
            used = int(gradient.any(dim=2).sum())
            if used <= MOST_OTHERS < output.shape[0] // 2:
                beside = trace.score if beside is None else beside
                continue  # in the last layers, often only the class token reaches the logits
        # The class token bypasses the patch tokens: it passes the last attention by the residual connection.
        norm = "norm" in type(module).__name__.lower() and len(output.shape) == 2
        whole = trace.score is None or trace.holds_all(output)
        if not (holds_all_values(model, image, output) if whole else norm and trace.feeds_all(output)):
            continue
        if (tried := tried + 1) > MOST_TRIED:
            break
        form = _form(model, image, output, output.forms)
        if form is None:
            passed_over = passed_over or (output.name if any(form.kind == "nchw" for form in output.forms) else "")
            continue
        if form.kind == "tokens":
            others = whole and beside is None and form.prefix + form.suffix > 0
            if others and not holds_all_values(model, image, output, form):
                # The others hold evidence. A layer is read from which they still take it.
                beside = part_beside(output, form, gradient)
                continue
            if trace.score is not None and not reaches(output, form, trace.score if beside is None else beside):
                continue
        if passed_over and passed_over not in output.name:
            warnings.warn(
                f"using layer {output.name} of {name}: the later layer {passed_over} does not keep the positions of "
                "the image",
                stacklevel=2,
            )
        return output.name, form, output.use
    uses = {output.name: output.use + 1 for output in trace.outputs if output.forms}
    often = [part for part, count in uses.items() if count > 1]
    why = "; parts made by torch.jit cannot be read" if scripted else ""
    if trace.score is None and not scripted:
        why = "; no gradient flows from the logits to the image"
    elif often:
        why = f"; {often[-1]} runs {uses[often[-1]]} times for one prediction"
    raise NotApplicable(
        f"{name} has no layer that all evidence passes through and whose cells keep their positions in the image{why}; "
        "choose one with layer=NAME"
    )


def _form(model: nn.Module, image: Tensor, output: Output, forms: list[Form]) -> Form | None:
    """The form whose cells keep their positions in the image best; None if all forms are below `EXPLAINED`.

    Forms of another grid are tried only if those of the grids before fail.
    A map that does not change at all tells nothing. Then it must have channels first, and the image's aspect ratio.
    """
    outputs: dict[Any, Tensor] = {}
    best: tuple[float, Form | None] = (EXPLAINED, None)
    for form in forms:
        grid = form.cells(output.shape)
        found = best[1]
        if found is not None and best[0] >= EXPLAINED and (found.kind == "nchw" or found.cells(output.shape) != grid):
            break
        passed = replayed(lambda images: outputs_of(model, images, output), outputs, grid)

        def read(images: Tensor, form: Form = form, passed: Callable[[Tensor], Tensor] = passed) -> Tensor:
            return form.to_map(passed(images))

        try:
            share = order(image, grid, read, known=best[0])
        except OtherRows:
            return None
        if share is None and form.kind == "nchw" and fits(grid, (image.shape[2], image.shape[3])):
            return form
        if share is not None and share >= best[0]:
            best = (share, form)
    return best[1]


def _is_ordered_at_all(model: nn.Module, image: Tensor, output: Output, form: Form) -> bool:
    """Whether the cells of an output, whose form is known, do not lie on the image in another order."""
    whole = torch.zeros(1, *output.shape, device=image.device)
    grid = (form.to_map(whole).shape[2], form.to_map(whole).shape[3])
    try:
        share = order(image, grid, lambda images: form.to_map(outputs_of(model, images, output)))
    except OtherRows:
        return False
    return share is None or share >= ORDERED_AT_ALL


def _check_moves(layer: Layer, shape: tuple[int, ...], image: Tensor) -> None:
    """Raise `InputError` unless a function only moves or drops the values of each row, whatever they are."""
    count = math.prod(shape)
    places = torch.randperm(count, generator=torch.Generator().manual_seed(0)) + 1
    rows = torch.stack([places, places + count]) * (1 - 2 * (places % 2))  # different values, positive and negative
    exact = torch.float32 if 2 * count < 2**24 else torch.float64
    values = rows.view(2, *shape).to(image.device, exact)
    made, opposite = layer.feature_map(values), layer.feature_map(-values)
    moved = made.shape == opposite.shape and torch.equal(made, -opposite) and len(torch.unique(made)) == made.numel()
    if not moved or not all(bool(torch.isin(*pair).all()) for pair in zip(made, values, strict=True)):
        raise InputError(f"layer {layer.name}: reshape= must only move or drop values; it computes or repeats some")


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
    trace = traced(model, image, only=name)
    if not trace.outputs:
        raise InputError(f"layer {layer} was not used in the forward pass, or gives no tensor with one row per image")
    last, count = trace.outputs[-1], len(trace.outputs)
    if count > 1 and not all(trace.passes(one, last) for one in trace.outputs[:-1]):
        raise NotApplicable(
            f"layer {layer} runs {count} times for one prediction, and the logits use more than the last run"
        )
    has_graph = trace.score is not None and last.node is not None
    if not (trace.matters(last) if has_graph else changes_logits(model, image, last)):
        raise NotApplicable(f"the logits do not depend on layer {layer}")
    if callable(reshape):
        moving = Form("function", function=reshape)
        _check_moves(Layer(parts[layer], layer, moving), last.shape, image)
        return name, moving, last.use
    size = (image.shape[2], image.shape[3])
    vit = find_transformer(model)
    if vit is not None and any(part is parts[layer] for part in vit.modules()) and len(last.shape) == 2:
        own = patches(vit, size) if reshape in (None, "tokens") else None
        if own is not None and _is_ordered_at_all(model, image, last, own):
            return name, own, last.use
    forms = [form for form in last.forms if reshape in (None, form.kind)]
    form = _form(model, image, last, forms)
    if reshape is not None and forms:
        form = form or forms[0]  # of tokens, all fill the grid
    if form is None:
        raise InputError(
            f"layer {layer} gives no feature map (B, C, h, w) whose cells keep their positions in an image of "
            f"{size[0]} × {size[1]}; it gives {last.shape} per image. Choose another layer, or give the form with "
            "reshape="
        )
    return name, form, last.use
