"""Rules of propagation: what an operation passes back, in place of its derivative.

`Rules` sees every torch function of a forward pass, in a module or not. A table has the rule of each kind of operation.
What flows back is a multiplier m, like a gradient: the relevance of a value x is x · m. So operations that only move or
add up values need no rule: their derivative shares out relevance in proportion to what each value contributes.

Whatever lies between the images and the score without a rule is refused by name: operations of unknown kinds, parts
that torch functions do not show (custom autograd functions, torch.jit), and values that depend on the image without a
gradient, such as masks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.eager import RECOMPUTES, name_of, nodes_of
from interp_models.core.errors import NotApplicable
from interp_models.core.prepared import class_name
from interp_models.explainers.calls import (
    Call,
    Mark,
    Memory,
    Table,
    is_in_place,
    kind_of,
    mapped,
    only_places,
    refused,
    ruled,
    tensors_in,
)
from interp_models.explainers.operations import (
    CASTS,
    COMPARES,
    KEEPS,
    KINDS,
    LAST,
    ONLY_SHAPES,
    SHIFTS,
    SIGMOIDS,
    SILENT,
    Kind,
)


class Rules(Memory):
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
        super().__init__(method, relevance=relevance, bounds=bounds)
        self.model, self.table, self.last = model, table, last
        self.inside = 0
        """Number of running modules that have a rule as a whole. Functions inside them are left alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            name = func.__self__.__name__
        if name in SILENT or name.startswith("_set_"):
            return func(*args, **kwargs)
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        in_place = is_in_place(name, args, kwargs)
        name = name.strip("_")
        if name == "requires_grad":
            made: Tensor = func(*args, **kwargs)
            return self.start(made, image=False) if made.requires_grad and made.is_leaf else made
        marked: list[tuple[Tensor, Mark]] = []
        for x in tensors_in((args, kwargs)):
            mark = self.mark(x)
            if mark is None and x.grad_fn is not None and self.reaches(x):
                mark = Mark()
                last = name_of(x.grad_fn)
                noted = refused(x, last, self._unseen(last))
                self.set_mark(noted, mark)
                args, kwargs = mapped(args, {id(x): noted}), mapped(kwargs, {id(x): noted})
                x = noted
            if mark is not None:
                marked.append((x, mark))
        if not marked:
            return func(*args, **kwargs)
        if in_place:
            self.spare(args[0])
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
            self.set_mark(args[0], Mark())
        elif name not in ONLY_SHAPES:
            self._mark_result(result, call)
        return result

    def _ran(self, call: Call, blind: list[Tensor], count: int) -> Any:
        if self.inside:
            return call.plain()
        if (positive := self._as_relu(call, blind)) is not None:
            call = positive
        elif blind and not only_places(call, blind):
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
        args, kwargs = mapped(call.args, new), mapped(call.kwargs, new)
        return Call(self, call.name, call.func, args, kwargs, operands, call.in_place)

    def entered(self, x: Tensor) -> Tensor:
        """A raw tensor as one of the network: its multiplier m is turned into relevance x · m."""
        kept = self.keep(x)
        made = ruled(x.detach().clone(), lambda m: [kept.value * m], [x])
        self.set_mark(made, Mark())
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
            for x in tensors_in(result):
                self.set_mark(x, Mark(raw=True))
            return result
        with torch.no_grad():
            ends = [call.of(*(mark.bounds[i] for mark in raw if mark.bounds is not None)) for i in range(2)]
        self.set_mark(result, Mark(raw=True, bounds=(ends[0], ends[1])))
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

    def _mark_result(self, result: Any, call: Call) -> None:
        for x in tensors_in(result):
            if not x.requires_grad:
                self._mark_blind(x, call.name, call.args, call.kwargs)
            elif (mark := self.mark(x)) is None or mark.blind or call.in_place:
                before = [self.mark(operand) for operand in call.operands]
                moved = KINDS.get(call.name) == "structure" and all(one is not None and one.gate for one in before)
                self.set_mark(x, Mark(gate=moved or call.name in SIGMOIDS))
        if call.in_place and isinstance(call.args[0], Tensor):
            self.set_mark(call.args[0], Mark(gate=call.name in SIGMOIDS))

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
        for x in tensors_in(result):
            if self.mark(x) is None or x.grad_fn is None:
                self.set_mark(x, Mark(blind=True, mask=mask))

    def _unseen(self, operation: str) -> str:
        return (
            f"computes {operation} in a way that {self.method} cannot see, such as a custom autograd function or "
            "torch.jit; write it with torch functions"
        )

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
        if self.mark(score) is None and self.reaches(score):
            raise NotApplicable(f"{name} {self._unseen(name_of(score.grad_fn))}")
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
