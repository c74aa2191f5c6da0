"""Calls of torch functions on what depends on the image, each with a backward that a rule may replace."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from interp_models.core.eager import nodes_of
from interp_models.core.errors import NotApplicable
from interp_models.explainers.operations import INDEXES, KINDS, ONLY_SHAPES, Kind

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


class InPlace(torch.autograd.Function):
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


class Memory(TorchFunctionMode):
    """What rules know of the tensors of a pass. `rules.Rules` adds what they do with it.

    Args:
        method: what the rules are called in messages.
        relevance: see `rules.Rules`.
        bounds: see `rules.Rules`.
    """

    def __init__(self, method: str, *, relevance: bool, bounds: bool) -> None:
        super().__init__()
        self.method, self.relevance, self.bounds = method, relevance, bounds
        self._marks: Any = WeakIdKeyDictionary()
        self._kept: dict[int, list[Kept]] = {}
        self._starts: list[Any] = []

    def start(self, x: Tensor, *, image: bool = True) -> Tensor:
        """Follow what depends on a leaf of the graph, the images or features."""
        if torch.is_inference_mode_enabled():
            raise NotApplicable(f"the network runs in inference mode, in which {self.method} has no gradients")
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

    def spare(self, target: Any) -> None:
        """Copy kept values that share the memory of a tensor before an operation works on it in place."""
        if isinstance(target, Tensor):
            for kept in self._kept.pop(target.untyped_storage().data_ptr(), []):
                kept.value = kept.value.clone()

    def reaches(self, x: Tensor) -> bool:
        """Whether a tensor's graph leads to the start."""
        if not self._starts:
            return False
        above = nodes_of(x.grad_fn)
        return any(start in above for start in self._starts)


@dataclass
class Call:
    """A call of a torch function on tensors that depend on the image."""

    rules: Memory
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
        return self.func(*mapped(self.args, new), **mapped(self.kwargs, new))

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
        result = _each(self.plain(), lambda x: refused(x, self.name, reason))
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


def refused(x: Tensor, name: str, reason: str) -> Tensor:
    """A tensor that `rules.Rules.check` refuses if the score depends on it."""
    made: Tensor = _Refused.apply(x, name, reason)  # type: ignore[no-untyped-call]
    return made


def mapped(tree: Any, new: Mapping[int, Tensor]) -> Any:
    if isinstance(tree, dict):
        return {key: mapped(value, new) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(mapped(value, new) for value in tree)
    return new.get(id(tree), tree)


def _each(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A result, with every differentiable tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree) if tree.requires_grad else tree
    if isinstance(tree, list | tuple):
        parts = [_each(part, change) for part in tree]
        return type(tree)(parts)
    return tree


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from tensors_in(part)
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from tensors_in(part)


def only_places(call: Call, blind: list[Tensor]) -> bool:
    """Whether tensors without a gradient only say which values are taken, or of which shape."""
    if call.name in ONLY_SHAPES or call.name in ("view_as", "reshape_as", "expand_as", "type_as"):
        return True
    return call.name in INDEXES and len(call.operands) == 1 and all(x.dtype != torch.bool for x in blind)


def is_in_place(name: str, args: Any, kwargs: Any) -> bool:
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
