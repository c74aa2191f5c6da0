"""CNN Fixations: the neurons that contribute most, traced back layer by layer to points of the image."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.maps import full_precision
from interp_models.core.prepared import class_name
from interp_models.core.scoring import Score, Target, logits_of, resolve_target
from interp_models.explainers.base import EXPLAINERS, Explainer

ELEMENTWISE = (
    "relu", "relu_", "hardtanh", "hardtanh_", "clamp", "clamp_", "clamp_min", "clamp_min_", "clone", "_to_copy",
    "alias", "detach", "mul", "mul_", "div", "div_", "sub", "sub_", "rsub", "add", "add_",
)  # fmt: skip
"""Operations that keep each value's place. Products and differences are of one tensor that depends on the image."""
RESHAPING = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten")
"""Operations that keep the order of values."""
NORMS = ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training", "miopen_batch_norm")
AT_ONCE = 128
"""Windows that are read together."""


@EXPLAINERS.register("cnn_fixations")
class CNNFixations(Explainer):
    """CNN Fixations: S(p) = Σ_f exp(-|p - f|² / (2 σ²)) over fixations f (Mopuri, Garg and Babu, IEEE Transactions on
    Image Processing 2019).

    Fixations are the pixels at which paths end that start at the target's logit and go back layer by layer. A linear
    layer passes a path to all inputs with a positive contribution (weight · activation), or, where it reads a feature
    map of several cells, to the one with the largest. A convolution passes it to the channel with the largest sum of
    contributions over its window, and there to the place with the largest contribution. Pooling passes it to the
    largest activation of the window, a sum to its larger term, a concatenation to its part, and batch norm and ReLU
    pass it on. A path that leads into the padding of a separate padding layer ends there. Paths that meet are merged. A
    fixation is kept if more than 5 % of all fixations lie within a tenth of the image's diagonal around it. One forward
    pass is recorded. The map has the resolution of the input. It is 0 if no contribution is positive.

    Args:
        model: any module that returns logits, of the layers above.
        sigma: σ in pixels.
        score: the logit or the probability; both have the same paths.

    Raises:
        NotApplicable: for a network with other operations between image and logits.
    """

    needs = ("plain_cnn",)
    amplifies_rounding = True
    stands_bfloat16 = False

    def __init__(self, model: nn.Module, *, sigma: float = 20.0, score: Score = "logit") -> None:
        super().__init__(model, score=score)
        if not sigma > 0:
            raise InputError(f"cnn_fixations: sigma must be above 0; got {sigma}")
        self.sigma = sigma

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        images = inputs.clone()  # no view, whose changes in place would be missed
        with _Recorder(images) as recorder:
            logits = logits_of(self.model(images))
        targets = resolve_target(target, logits)
        start = torch.stack([torch.arange(len(inputs), device=inputs.device), targets], dim=1)
        name = class_name(self.model)
        if not recorder.saw(logits):
            why = f"cnn_fixations cannot see how {name} computes its logits, so it cannot trace them back"
            raise NotApplicable(why)
        try:
            points = recorder.traced(logits, start)
        except _UnknownOperation as error:
            raise NotApplicable(f"{name} computes {error}, which cnn_fixations cannot trace back") from None
        maps = [self._map(points[points[:, 0] == b][:, 2:], inputs) for b in range(len(inputs))]
        return torch.stack(maps)

    def _map(self, points: Tensor, inputs: Tensor) -> Tensor:
        """The map (H, W) of points (n, 2)."""
        points = _distinct(points).to(torch.promote_types(inputs.dtype, torch.float32))
        height, width = inputs.shape[-2:]
        near = (points[:, None] - points).square().sum(dim=2) < 0.01 * (height**2 + width**2)
        points = points[near.sum(dim=1) > 0.05 * len(points)]
        rows, columns = (
            torch.exp(-(torch.arange(n, device=points.device) - at[:, None]).square() / (2 * self.sigma**2))
            for n, at in zip((height, width), points.unbind(dim=1), strict=True)
        )
        with full_precision(rows):
            return rows.T @ columns


class _UnknownOperation(Exception):
    """An operation that has no rule."""


class _Step(NamedTuple):
    """One operation of a recorded pass."""

    name: str
    args: tuple[Any, ...]
    sources: tuple[int, ...]
    """Numbers of the steps that made its tensors, as far as they depend on the images; 0 are the images."""
    values: tuple[Tensor, ...]
    """These tensors as they were then."""
    made: Tensor
    places: Tensor | None
    """Places that max pooling has taken."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations on everything that depends on the images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = [_Step("images", (), (), (), images, None)]  # keeps tensors alive, so that ids stay unique
        self._numbers = {id(images): 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
        known = [x for x in tensors if isinstance(x, Tensor) and id(x) in self._numbers]
        values = tuple(x.clone() for x in known)  # they may be changed in place
        sources = tuple(self._numbers[id(x)] for x in known)
        if known and name.endswith("_") and known[0]._is_view():
            name = "a change of a view in place"
        result = func(*args, **(kwargs or {}))
        made, *others = result if isinstance(result, tuple | list) else (result,)
        if known and isinstance(made, Tensor):
            self._numbers[id(made)] = len(self._steps)
            self._steps.append(_Step(name, tuple(args), sources, values, made, others[0] if others else None))
        return result

    def saw(self, x: Tensor) -> bool:
        """Whether a recorded operation computed a tensor."""
        return id(x) in self._numbers

    def traced(self, logits: Tensor, start: Tensor) -> Tensor:
        """Points of the images (n, 4) that points of the logits (n, 2) come from."""
        waiting = {self._numbers[id(logits)]: [start]}
        for number in range(len(self._steps) - 1, 0, -1):
            if number in waiting:
                points = _distinct(torch.cat(waiting.pop(number)))
                for source, some in self._back(self._steps[number], points) if len(points) else []:
                    waiting.setdefault(source, []).append(some)
        found = waiting.get(0)
        return _distinct(torch.cat(found)) if found else start.new_zeros(0, 4)

    def _back(self, step: _Step, points: Tensor) -> list[tuple[int, Tensor]]:
        """The sources of an operation, with the points that its points come from."""
        (source, *others), (value, *_) = step.sources, step.values
        if step.name in ("addmm", "mm") and not others and value.dim() == 2:
            before = self._steps[source]
            maps = before.name in RESHAPING and before.values[0].dim() == 4 and before.values[0][0, 0].numel() > 1
            return [(source, _of_linear(value, step.args[-1], points, largest=maps))]
        if step.name in ("add", "add_") and len(others) == 1 and step.values[0].shape == step.values[1].shape:
            first = torch.ge(*(_at(one, points) for one in step.values))
            return [(source, points[first]), (others[0], points[~first])]
        if step.name == "cat" and len(step.args[0]) == len(step.sources):
            return _of_cat(step, points)
        if others:
            raise _UnknownOperation(f"{step.name} of several features")
        same = value.shape == step.made.shape
        if same and step.name in (*ELEMENTWISE, *NORMS):
            return [(source, points)]
        if same and step.name == "as_strided_" and torch.equal(value, step.made):
            return [(source, points)]  # other strides for the same values, as behind a pool with channels last
        if step.name in RESHAPING:
            flat = (points * _strides(step.made.shape, points)).sum(dim=1, keepdim=True)
            sides = torch.tensor(value.shape, device=points.device)
            return [(source, flat // _strides(value.shape, points) % sides)]
        if value.dim() == 4 and points.shape[1] in (2, 4):
            if step.name == "convolution" and not step.args[6]:
                parts = [_of_convolution(value, *step.args[1:], points=some) for some in torch.split(points, AT_ONCE)]
                return [(source, torch.cat(parts))]
            if step.name == "constant_pad_nd":
                return [(source, _of_padding(value, step.args[1], points))]
            if step.name == "max_pool2d_with_indices" and step.places is not None:
                places = _at(step.places, points)
                return [(source, torch.stack([*points[:, :2].T, places // value.shape[3], places % value.shape[3]], 1))]
            if (window := _window(step, value)) is not None:
                return [(source, torch.stack([_of_mean(value, point, window) for point in points]))]
        raise _UnknownOperation(step.name)


def _distinct(points: Tensor) -> Tensor:
    """The points (n, d) without repetitions, in order."""
    sides = torch.Size((points.amax(dim=0) + 1).tolist()) if len(points) else torch.Size([1] * points.shape[1])
    strides = _strides(sides, points)
    flat: Tensor = torch.unique((points * strides).sum(dim=1))  # of numbers: rows take several times as long
    return flat[:, None] // strides % torch.tensor(sides, device=points.device)


def _strides(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.tensor([shape[n + 1 :].numel() for n in range(len(shape))], device=like.device)


def _at(x: Tensor, points: Tensor) -> Tensor:
    return x[tuple(points.unbind(dim=1))]


def _of_linear(x: Tensor, weight: Tensor, points: Tensor, *, largest: bool) -> Tensor:
    """Inputs (m, 2) that contribute to outputs (n, 2) of x (B, C) @ weight (C, K): the largest of each, or those above
    0."""
    contributions = x[points[:, 0]].float() * weight.T[points[:, 1]].float()
    if largest:
        return torch.stack([points[:, 0], contributions.argmax(dim=1)], dim=1)
    n, c = (contributions > 0).nonzero(as_tuple=True)
    return torch.stack([points[n, 0], c], dim=1)


def _of_padding(x: Tensor, pads: Any, points: Tensor) -> Tensor:
    """The places in x (B, C, h, w) of points (n, 4) of the padded x; points in the padding have none."""
    pairs = [*zip(pads[::2], pads[1::2], strict=True), (0, 0), (0, 0), (0, 0)][:4]  # from the last axis to the first
    found = points - torch.tensor([before for before, _ in reversed(pairs)], device=points.device)
    return found[((found >= 0) & (found < torch.tensor(x.shape, device=points.device))).all(dim=1)]


def _of_cat(step: _Step, points: Tensor) -> list[tuple[int, Tensor]]:
    dim = step.args[1] if len(step.args) > 1 else 0
    found, first = [], 0
    for source, value in zip(step.sources, step.values, strict=True):
        end = first + value.shape[dim]
        some = points[(points[:, dim] >= first) & (points[:, dim] < end)].clone()
        some[:, dim] -= first
        found.append((source, some))
        first = end
    return found


def _of_convolution(
    x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any, output: Any,
    groups: int, *, points: Tensor,
) -> Tensor:  # fmt: skip
    """The input (n, 4) that contributes most to each output (n, 4)."""
    b, o = points[:, 0], points[:, 1]
    channels = (o // (len(weight) // groups) * weight.shape[1])[:, None] + torch.arange(
        weight.shape[1], device=o.device
    )
    rows, columns = (
        (points[:, 2 + n] * stride[n] - padding[n])[:, None]
        + dilation[n] * torch.arange(weight.shape[2 + n], device=o.device)
        for n in (0, 1)
    )
    inside = ((rows >= 0) & (rows < x.shape[2]))[:, :, None] & ((columns >= 0) & (columns < x.shape[3]))[:, None]
    read = x[
        b[:, None, None, None],
        channels[:, :, None, None],
        rows.clamp(0, x.shape[2] - 1)[:, None, :, None],
        columns.clamp(0, x.shape[3] - 1)[:, None, None],
    ]
    contributions = read.float() * weight[o].float() * inside[:, None]
    channel = contributions.sum(dim=(2, 3)).argmax(dim=1)
    each = torch.arange(len(b), device=o.device)
    place = contributions[each, channel].masked_fill(~inside, -torch.inf).flatten(1).argmax(dim=1)
    row, column = place // weight.shape[3], place % weight.shape[3]
    return torch.stack([b, channels[each, channel], rows[each, row], columns[each, column]], dim=1)


def _window(step: _Step, value: Tensor) -> Callable[[int, int], tuple[int, int]] | None:
    """Of average pooling, a function of an axis and a place on it: the first and last + 1 cells. None for others."""
    if step.name == "mean" and len(step.args) > 1 and sorted(n % 4 for n in step.args[1] or ()) == [2, 3]:
        return lambda axis, at: (0, value.shape[2 + axis])
    if step.name == "_adaptive_avg_pool2d":
        sizes = [(value.shape[2 + axis], step.made.shape[2 + axis]) for axis in (0, 1)]
        return lambda axis, at: (at * sizes[axis][0] // sizes[axis][1], -(-(at + 1) * sizes[axis][0] // sizes[axis][1]))
    if step.name == "avg_pool2d":
        sides, *rest = step.args[1:]
        steps = (rest and rest[0]) or sides
        pads = rest[1] if len(rest) > 1 else [0, 0]

        def window(axis: int, at: int) -> tuple[int, int]:
            first = at * steps[axis] - pads[axis]
            return max(first, 0), min(first + sides[axis], value.shape[2 + axis])

        return window
    return None


def _of_mean(value: Tensor, point: Tensor, window: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """The largest activation (4,) in the window of one point, (2,) or (4,)."""
    b, c, y, x = (*point.tolist(), 0, 0)[:4]
    (top, bottom), (left, right) = window(0, y), window(1, x)
    place = int(value[b, c, top:bottom, left:right].argmax())
    return point.new_tensor([b, c, top + place // (right - left), left + place % (right - left)])
