"""Rules of propagation: what an operation passes back, in place of its derivative.

`Rules` sees every torch function of a forward pass, in a module or not. A table has the rule of each kind of operation.
What flows back is a multiplier m, like a gradient: the relevance of a value x is x · m. So operations that only move or
add up values need no rule: their derivative shares out relevance in proportion to what each value contributes.

Whatever lies between the images and the score without a rule is refused by name: operations of unknown kinds, parts
that torch functions do not show (custom autograd functions, torch.jit), and values that depend on the image without a
gradient, such as masks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from interp_models.core.eager import RECOMPUTES, name_of, nodes_of, own_thread
from interp_models.core.errors import NotApplicable, unknown
from interp_models.core.prepared import class_name
from interp_models.explainers.operations import (
    CASTS,
    COMPARES,
    DIVIDES,
    INDEXES,
    KEEPS,
    KINDS,
    LAST,
    ONLY_SHAPES,
    POWERS,
    SHIFTS,
    SIGMOIDS,
    SILENT,
    Kind,
)

GUARD = 1e-3
"""Largest lower bound of a clamp that only guards a division."""

Back = Callable[[Tensor], Sequence[Tensor | None]]
"""From the multiplier of an operation's output to those of its operands."""


class _Ruled(torch.autograd.Function):
    """An operation with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, back: Back, made: list[Tensor], *operands: Tensor) -> Tensor:
        ctx.back = back
        ctx.set_materialize_grads(False)  # where a later part lets no gradient through, it must not become zeros
        return made.pop()

    @staticmethod
    def backward(ctx: Any, *multipliers: Tensor | None) -> Any:
        back = [None] * (len(ctx.needs_input_grad) - 2) if multipliers[0] is None else ctx.back(multipliers[0])
        return (None, None, *back)


class _InPlace(torch.autograd.Function):
    """An operation on its operand's own memory, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, back: Back, call: "Call", target: Tensor) -> Tensor:
        ctx.back = back
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(target)
        result = call.func(target, *call.args[1:], **call.kwargs)
        return target if result is target else target.copy_(result)

    @staticmethod
    def backward(ctx: Any, *multipliers: Tensor | None) -> Any:
        return (None, None, None if multipliers[0] is None else ctx.back(multipliers[0])[0])


class _Refused(torch.autograd.Function):
    """The identity, which leaves its reason in the graph: the check finds it if it lies on the way to the score."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, reason: str) -> Tensor:
        ctx.refused = (name, reason)
        return x.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


@dataclass
class Kept:
    """A value that a rule needs later. It is copied before an operation works on its memory in place."""

    value: Tensor


@dataclass
class Mark:
    """What is known of a tensor that depends on the image."""

    blind: bool = False
    """Whether it does so without a gradient."""
    raw: bool = False
    """Whether it has the image's own values, moved, shifted or scaled."""
    bounds: tuple[Tensor, Tensor] | None = None
    """Of a raw tensor, its values for a black and for a white image."""
    call: "Call | None" = None
    """The weighted sum that it is the output of."""
    gate: bool = False
    """Whether it is the output of a sigmoid."""
    mask: tuple[Tensor, bool] | None = None
    """Of a mask, the tensor whose values above 0 (or not above 0) it marks."""


@dataclass
class Call:
    """A call of a torch function on tensors that depend on the image."""

    rules: "Rules"
    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: list[Tensor] = field(default_factory=list)
    """The tensors of the arguments that depend on the image."""
    in_place: bool = False
    marked: bool = False
    """Whether its result has its mark."""

    def arg(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by its place or its name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def plain(self) -> Any:
        """Run it, with its own derivative."""
        return self.func(*self.args, **self.kwargs)

    def of(self, *values: Tensor) -> Any:
        """Run it on other values of its operands, out of place."""
        new = {id(old): value for old, value in zip(self.operands, values, strict=True)}
        if self.in_place and id(self.args[0]) in new:
            new[id(self.args[0])] = new[id(self.args[0])].clone()
        return self.func(*_mapped(self.args, new), **_mapped(self.kwargs, new))

    @torch.no_grad()
    def value(self) -> Any:
        """Its result, out of place and without a gradient."""
        return self.of(*self.operands)

    def ruled(self, back: Back, value: Tensor | None = None) -> Tensor:
        """Run it with another backward. The value is its result, if that is known."""
        value = self.value() if value is None else value
        made = ruled(value, back, self.operands)
        if not self.in_place:
            return made
        target: Tensor = self.args[0]
        return target.copy_(made)

    def refused(self, reason: str) -> Any:
        """Run it, with a note for the check."""
        result = _each(self.plain(), lambda x: self.rules.noted(x, self.name, reason))
        return self.args[0].copy_(result) if self.in_place and isinstance(result, Tensor) else result


Rule = Callable[[Call], Any]
"""Runs a call, so that its backward is that of the rule."""
Table = Mapping[Kind, Rule]


def plain(call: Call) -> Any:
    """The rule of the derivative."""
    return call.plain()


def ruled(value: Tensor, back: Back, operands: Sequence[Tensor]) -> Tensor:
    """A value as a function of operands, with this backward."""
    made: Tensor = _Ruled.apply(back, [value], *operands)  # type: ignore[no-untyped-call]
    return made


def _mapped(tree: Any, new: Mapping[int, Tensor]) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(value, new) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(_mapped(value, new) for value in tree)
    return new.get(id(tree), tree)


def _each(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A result, with every differentiable tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree) if tree.requires_grad else tree
    if isinstance(tree, list | tuple):
        parts = [_each(part, change) for part in tree]
        return type(tree)(parts)
    return tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)


class Rules(TorchFunctionMode):
    """While open, operations on what depends on the image follow the rules of a table.

    Args:
        model: the network.
        method: what the rules are called in messages.
        table: the rule of each kind; kinds without one are refused.
        relevance: whether what leaves the network at the image is relevance x · m and not a multiplier. Then shifts and
            scalings of pixels (the network's normalisation) pass relevance as it is.
        bounds: whether to follow the values of a black and of a white image through these.
        last: functions without a rule that may come last.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        table: Table,
        *,
        relevance: bool = False,
        bounds: bool = False,
        last: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.model, self.method, self.table = model, method, table
        self.relevance, self.bounds, self.last = relevance, bounds, last
        self.inside = 0
        """Number of running modules that have a rule as a whole. Functions inside them are left alone."""
        self._marks: Any = WeakIdKeyDictionary()
        self._kept: dict[int, list[Kept]] = {}
        self._starts: list[Any] = []

    def start(self, x: Tensor, *, image: bool = True) -> Tensor:
        """Follow what depends on a leaf of the graph, the images or features."""
        black = (torch.zeros_like(x), torch.ones_like(x)) if self.bounds and image else None
        self._marks[x] = Mark(raw=self.relevance and image, bounds=black)
        self._starts.append(get_gradient_edge(x).node)
        return x

    def mark(self, x: Tensor) -> Mark | None:
        """What is known of a tensor."""
        found: Mark | None = self._marks.get(x)
        return found

    def set_mark(self, x: Tensor, mark: Mark) -> None:
        """Note what is known of a tensor."""
        self._marks[x] = mark

    def keep(self, x: Tensor) -> Kept:
        """A value for the backward."""
        kept = Kept(x.detach())
        self._kept.setdefault(kept.value.untyped_storage().data_ptr(), []).append(kept)
        return kept

    def noted(self, x: Tensor, name: str, reason: str) -> Tensor:
        """A tensor that the check refuses if the score depends on it."""
        made: Tensor = _Refused.apply(x, name, reason)  # type: ignore[no-untyped-call]
        return made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        if name in SILENT or name.startswith("_set_"):
            return func(*args, **kwargs)
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        in_place = _in_place(name, args, kwargs)
        name = name.strip("_")
        if name == "requires_grad":
            made: Tensor = func(*args, **kwargs)
            return self.start(made, image=False) if made.requires_grad and made.is_leaf else made
        marked: list[tuple[Tensor, Mark]] = []
        for x in _tensors((args, kwargs)):
            mark = self.mark(x)
            if mark is None and x.grad_fn is not None and self._starts and self._reaches(x):
                mark = Mark()
                why = f"computes {name_of(x.grad_fn)} where {self.method} cannot reach it; use torch functions"
                noted = self.noted(x, name_of(x.grad_fn), why)
                self._marks[noted] = mark
                args, kwargs = _mapped(args, {id(x): noted}), _mapped(kwargs, {id(x): noted})
                x = noted
            if mark is not None:
                marked.append((x, mark))
        if not marked:
            return func(*args, **kwargs)
        if in_place:
            self._spare(args[0])
        operands = [x for x, mark in marked if not mark.blind]
        blind = [x for x, mark in marked if mark.blind]
        if not operands or not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            self._mark_blind(result, name, args, kwargs)
            return result
        unique = list({id(x): x for x in operands}.values())
        call = Call(self, name, func, tuple(args), dict(kwargs), unique, in_place)
        result = self._ran(call, blind, len(operands))
        if call.marked:
            return result
        if name == "setitem":
            self._marks[args[0]] = Mark()
        elif name not in ONLY_SHAPES:
            self._mark_result(result, call)
        return result

    def _ran(self, call: Call, blind: list[Tensor], count: int) -> Any:
        if self.inside:
            return call.plain()
        if (positive := self._as_relu(call, blind)) is not None:
            call = positive
        elif blind and not _only_places(call, blind):
            return call.refused(
                f"combines features with values that depend on the image without a gradient ({call.name}), which "
                f"{self.method} has no rule for"
            )
        kind = kind_of(call, count)
        raw = [mark for x in call.operands if (mark := self.mark(x)) is not None and mark.raw]
        moves = kind in ("structure", "scale", "batch_norm") or call.name in SHIFTS
        if moves and raw and len(raw) == len(call.operands):
            made = self._moved(call, kind, raw)
            if made is not None:
                call.marked = True
                return made
        if raw and call.in_place:
            return call.refused(f"changes its images in place by {call.name}, which {self.method} has no rule for")
        if raw and kind != "linear":
            call = self._entered(call)
        rule = None if kind is None else self.table.get(kind)
        if rule is None:
            return call.refused(f"has {call.name}, an operation that {self.method} has no rule for")
        return rule(call)

    def _entered(self, call: Call) -> Call:
        """The call with values of the network in place of the image's own: before them, relevance flows back."""
        new = {}
        for x in call.operands:
            if (mark := self.mark(x)) is not None and mark.raw:
                new[id(x)] = self.entered(x)
        operands = [new.get(id(x), x) for x in call.operands]
        args, kwargs = _mapped(call.args, new), _mapped(call.kwargs, new)
        return Call(self, call.name, call.func, args, kwargs, operands, call.in_place)

    def entered(self, x: Tensor) -> Tensor:
        """A raw tensor as one of the network: its multiplier m is turned into relevance x · m."""
        kept = self.keep(x)
        made = ruled(x.detach().clone(), lambda m: [kept.value * m], [x])
        self._marks[made] = Mark()
        return made

    def _moved(self, call: Call, kind: Kind | None, raw: list[Mark]) -> Any:
        """A call that moves, shifts or scales the image's own values; None for another."""
        if kind == "structure":
            if call.in_place:
                return None
            result = call.plain()
        else:
            value = call.value()
            same = isinstance(value, Tensor) and all(x.shape == value.shape for x in call.operands)
            if not same or len(call.operands) != 1:
                return None
            if kind == "batch_norm" and call.arg(5, "training", False):
                return None
            result = call.ruled(lambda m: [m], value)
        if not isinstance(result, Tensor) or any(mark.bounds is None for mark in raw):
            for x in _tensors(result):
                self._marks[x] = Mark(raw=True)
            return result
        with torch.no_grad():
            ends = [call.of(*(mark.bounds[i] for mark in raw if mark.bounds is not None)) for i in range(2)]
        self._marks[result] = Mark(raw=True, bounds=(ends[0], ends[1]))
        return result

    def _as_relu(self, call: Call, blind: list[Tensor]) -> Call | None:
        """A ReLU that is written as a maximum with 0 or by a mask; None for another call."""
        x: Any = None
        if call.name in ("maximum", "max") and len(call.args) == 2 and len(call.operands) == 1 and not blind:
            other = call.args[1] if call.args[0] is call.operands[0] else call.args[0]
            if isinstance(other, Tensor) and other.is_floating_point() and not other.any():
                x = call.operands[0]
                x = x if (x + other).shape == x.shape else None
        elif len(blind) == 1 and len(call.operands) == 1 and (mark := self.mark(blind[0])) and mark.mask is not None:
            source, positive = mark.mask
            if source is call.operands[0]:
                args = call.args
                zero = isinstance(args[-1], int | float | Tensor) and not torch.as_tensor(args[-1]).any()
                fits = {
                    "mul": positive and len(args) == 2,
                    "masked_fill": not positive and zero,
                    "setitem": not positive and zero,
                    "where": positive and zero and len(args) == 3 and (args[1] is source or args[0] is source),
                }
                x = source if fits.get(call.name, False) else None
        if x is None:
            return None
        in_place = call.in_place or call.name == "setitem"
        return Call(self, "relu", torch.relu, (x,), {}, [x], in_place)

    def _spare(self, target: Any) -> None:
        """Copy kept values that share the memory of a tensor before an operation works on it in place."""
        if isinstance(target, Tensor):
            for kept in self._kept.pop(target.untyped_storage().data_ptr(), []):
                kept.value = kept.value.clone()

    def _mark_result(self, result: Any, call: Call) -> None:
        for x in _tensors(result):
            if not x.requires_grad:
                self._mark_blind(x, call.name, call.args, call.kwargs)
            elif (mark := self.mark(x)) is None or mark.blind or call.in_place:
                before = [self.mark(operand) for operand in call.operands]
                moved = KINDS.get(call.name) == "structure" and all(one is not None and one.gate for one in before)
                self._marks[x] = Mark(gate=moved or call.name in SIGMOIDS)
        if call.in_place and isinstance(call.args[0], Tensor):
            self._marks[call.args[0]] = Mark(gate=call.name in SIGMOIDS)

    def _mark_blind(self, result: Any, name: str, args: Any, kwargs: Any) -> None:
        if name in ONLY_SHAPES:
            return
        mask = None
        if name in COMPARES and len(args) == 2 and isinstance(args[1], int | float) and args[1] == 0:
            mask = (args[0], COMPARES[name])
        elif (
            args and isinstance(args[0], Tensor) and (mark := self.mark(args[0])) is not None and mark.mask is not None
        ):
            if name in CASTS:
                mask = mark.mask
            elif name in ("bitwise_not", "logical_not", "invert"):
                mask = (mark.mask[0], not mark.mask[1])
        for x in _tensors(result):
            if self.mark(x) is None or x.grad_fn is None:
                self._marks[x] = Mark(blind=True, mask=mask)

    def _reaches(self, x: Tensor) -> bool:
        """Whether a tensor's graph leads to the start."""
        above = nodes_of(x.grad_fn)
        return any(start in above for start in self._starts)

    def check(self, score: Tensor) -> None:
        """Refuse a network whose score depends on the image by an operation without a rule.

        Args:
            score: what the network returned, or a function of it.

        Raises:
            NotApplicable: if so.
        """
        if score.grad_fn is None:
            return
        name = class_name(self.model)
        above = nodes_of(score.grad_fn)
        if any("CheckpointFunction" in name_of(node) for node in above):
            raise NotApplicable(RECOMPUTES)
        if self.mark(score) is None and any(start in above for start in self._starts):
            last = name_of(score.grad_fn)
            raise NotApplicable(f"{name} computes {last} where {self.method} cannot reach it; use torch functions")
        waiting, seen = [(score.grad_fn, True)], set()
        while waiting:
            node, ends = waiting.pop()
            if (node, ends) in seen:
                continue
            seen.add((node, ends))
            refused = getattr(node, "refused", None)
            if refused is not None:
                if not (ends and refused[0] in self.last):
                    raise NotApplicable(f"{name} {refused[1]}")
            else:
                operation = name_of(node)
                ends = ends and (operation in KEEPS or operation.lower().replace("_", "") in LAST)
            waiting += [(parent, ends) for parent, _ in node.next_functions if parent is not None]


def _only_places(call: Call, blind: list[Tensor]) -> bool:
    """Whether tensors without a gradient only say which values are taken, or of which shape."""
    if call.name in ONLY_SHAPES or call.name in ("view_as", "reshape_as", "expand_as", "type_as"):
        return True
    return call.name in INDEXES and len(call.operands) == 1 and all(x.dtype != torch.bool for x in blind)


def _in_place(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call changes its first argument."""
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return True
    if kwargs.get("inplace") is True:
        return True
    known = name.strip("_")
    return KINDS.get(known) == "elementwise" and any(value is True for value in args[1:])


def kind_of(call: Call, count: int) -> Kind | None:
    """The kind of a call with `count` operands that depend on the image; None if it is unknown."""
    kind = KINDS.get(call.name)
    if kind == "linear":
        return "linear" if count == 1 else "product"
    if call.name == "prod":
        return "product"
    if kind == "product":
        return "scale" if count == 1 else "product"
    if kind == "quotient":
        if count > 1:
            return "quotient"
        divided = call.name.startswith("r") or (len(call.args) == 2 and call.args[1] is call.operands[0])
        return "elementwise" if divided else "scale"
    if kind == "either":
        return "either" if count > 1 else "elementwise"
    if call.name in ("max", "min") and count > 1:
        return "either"
    if kind == "elementwise" and count > 1:
        return None
    return kind


# --- Deconvnet and guided backpropagation ---

Backward = Literal["deconvnet", "guided"]


class BackwardRules(Rules):
    """The gradient, but deconvnet's or guided backpropagation's rule at ReLU and ReLU6, however they are written.

    Products, norms and softmax keep their derivatives; functions of one value other than powers are refused.

    Args:
        model: the network.
        rule: `deconvnet` or `guided`.
        activations: names of further activation classes that follow the rule, see `backward_rule`.
    """

    def __init__(self, model: nn.Module, rule: Backward, activations: Sequence[str] = ()) -> None:
        others: tuple[Kind, ...] = (
            "structure", "sum", "scale", "linear", "product", "quotient", "maximum", "norm", "batch_norm", "softmax",
            "statistic", "attention",
        )  # fmt: skip
        table: dict[Kind, Rule] = {**dict.fromkeys(others, plain), "elementwise": self.activation}
        super().__init__(model, rule, table, last=LAST)
        self.rule: Backward = rule
        self.activations = activations
        self.count = 0
        """Number of activations that follow the rule."""

    def activation(self, call: Call) -> Any:
        """The rule at a function of one value."""
        if call.name in POWERS or call.name in DIVIDES:
            return call.plain()
        low, high = clamped(call)
        if 0 < low <= GUARD and high == torch.inf:
            return call.plain()
        if low != 0.0 or high <= 0.0:
            return call.refused(self._without_rule(call.name))
        self.count += 1
        kept: list[Kept] = []

        def back(m: Tensor) -> list[Tensor]:
            return [hardtanh_backward(m, kept[0].value, 0.0, high).clamp_(min=0) if kept else m.clamp(min=0)]

        x = call.operands[0]
        if call.in_place and not x._is_view():  # torch does not let a custom function modify a view
            made: Tensor = _InPlace.apply(back, call, x)  # type: ignore[no-untyped-call]
            value = made
        else:
            value = call.value()
            made = call.ruled(back, value)
        if self.rule == "guided":
            kept.append(self.keep(value))
        return made

    def _without_rule(self, name: str) -> str:
        letters = name.replace("_", "")
        left = {type(part).__name__ for part in self.model.modules() if type(part).__name__.lower() == letters}
        if found := ", ".join(sorted(left - set(self.activations))):
            return (
                f"has activations {found}, which {self.rule} has no rule for; name them with activations=[{found}] to "
                "treat them like ReLU"
            )
        return (
            f"has the function {name}, which is an activation that {self.rule} has no rule for; use its module "
            "instead, and name that in activations="
        )

    def named(self, x: Tensor, y: Tensor) -> Tensor:
        """The output y of a named activation of x, with the rule: guided where y > 0 (Nielsen et al., equation 4)."""
        self.count += 1
        passes = (y > 0).to(y.dtype) if self.rule == "guided" else None
        made = ruled(y.detach().clone(), lambda m: [m.clamp(min=0) if passes is None else m.clamp(min=0) * passes], [x])
        self.set_mark(made, Mark())
        return made

    def check(self, score: Tensor) -> None:
        """As of the base class; and refuse a network without an activation to apply the rule to."""
        super().check(score)
        if not self.count and score.grad_fn is not None:
            raise NotApplicable(
                f"{class_name(self.model)} has no ReLU to apply {self.rule} to; name its activations with activations="
            )


def hardtanh_backward(m: Tensor, y: Tensor, low: float, high: float) -> Tensor:
    """The multiplier m where y lies between low and high, else 0."""
    made: Tensor = torch.ops.aten.hardtanh_backward(m, y.to(m.dtype), low, high)
    return made


def clamped(call: Call) -> tuple[float, float]:
    """The least and the largest value of a ReLU, ReLU6 or clamp; NaN for another function, or bounds of tensors."""
    if call.name == "relu":
        return 0.0, torch.inf
    if call.name == "relu6":
        return 0.0, 6.0
    if call.name == "threshold":
        both = (call.arg(1, "threshold"), call.arg(2, "value"))
        return (0.0, torch.inf) if both == (0, 0) else (torch.nan, torch.nan)
    names = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
    default = (-1.0, 1.0) if call.name == "hardtanh" else (None, None)
    if call.name not in ("hardtanh", "clamp", "clip", "clamp_min", "clamp_max"):
        return torch.nan, torch.nan
    low, high = (call.arg(i + 1, names[i], default[i]) for i in range(2))
    if call.name == "clamp_max":
        low, high = None, low
    if any(value is not None and not isinstance(value, int | float) for value in (low, high)):
        return torch.nan, torch.nan
    return (-torch.inf if low is None else float(low)), (torch.inf if high is None else float(high))


@contextmanager
def backward_rule(model: nn.Module, rule: Backward, activations: Sequence[str] = ()) -> Iterator[BackwardRules]:
    """While open, the backward of a forward pass follows a rule at activations.

    ReLU and ReLU6 follow it, as modules and as functions. Further activation modules follow it if their class is named;
    guided backpropagation passes the gradient where their output is above 0 (Nielsen et al., equation 4).

    Args:
        model: the network.
        rule: `deconvnet` or `guided`.
        activations: names of further activation classes.

    Yields:
        The rules. Their `start` gets the images before the pass, their `check` the score after it.

    Raises:
        InputError: if no module of the model has a named class.
    """
    kinds = {type(part).__name__ for part in model.modules()}
    for name in activations:
        if name not in kinds:
            raise unknown(f"activation of {class_name(model)}:", name, sorted(kinds))
    rules = BackwardRules(model, rule, activations)
    given: dict[nn.Module, Tensor] = {}

    @own_thread
    def before(module: nn.Module, args: Any) -> Any:
        rules.inside += 1
        given[module] = args[0]
        return (args[0].clone(), *args[1:])  # the activation may work in place

    @own_thread
    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rules.inside -= 1
        return rules.named(given.pop(module), output)

    kept = (nn.ReLU, nn.ReLU6)  # these follow the rule, named or not
    named = [part for part in model.modules() if type(part).__name__ in activations and not isinstance(part, kept)]
    handles = [part.register_forward_pre_hook(before) for part in named]
    handles += [part.register_forward_hook(after) for part in named]
    try:
        yield rules
    finally:
        for handle in handles:
            handle.remove()
