"""Rules for the way back through activations: deconvolution and guided backpropagation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp_models.errors import InputError
from interp_models.prepared import class_name
from interp_models.registry import unknown

Rule = Literal["deconvnet", "guided"]

RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
HARDTANH = (F.hardtanh, F.hardtanh_)
"""By which ReLU6 is made."""
IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_, F.hardtanh_)
OTHERS = (
    nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid,
    nn.LeakyReLU, nn.PReLU, nn.LogSigmoid, nn.Softsign, nn.RReLU,
)  # fmt: skip
"""Activations that no paper has a rule for."""


class _Ruled(torch.autograd.Function):
    """An activation's output; backwards by the rule: R where R > 0 and, if guided, where its input passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, passes: Tensor | None) -> Tensor:
        ctx.passes = passes
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        relevance = gradients[0].clamp(min=0)
        return relevance if ctx.passes is None else relevance * ctx.passes, None, None


class _Clamped(torch.autograd.Function):
    """A ReLU or ReLU6; backwards by the rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, rule: Rule, in_place: bool) -> Tensor:
        y = x.clamp_(0.0, high) if in_place else x.clamp(0.0, high)
        if in_place:
            ctx.mark_dirty(x)
        if rule == "guided":
            ctx.save_for_backward(y)
        ctx.high = high
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        relevance = gradients[0].clamp(min=0)
        for y in ctx.saved_tensors:
            relevance = torch.ops.aten.hardtanh_backward(relevance, y, 0.0, ctx.high)
        return relevance, None, None, None


class _Rules(TorchFunctionMode):
    """Applies a rule to every ReLU and ReLU6, of modules and of functions alike, and counts them."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule, self.count = rule, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        low, high = 0.0, 6.0 if func is F.relu6 else torch.inf
        if func in HARDTANH:
            low = float(args[1] if len(args) > 1 else kwargs.get("min_val", -1.0))
            high = float(args[2] if len(args) > 2 else kwargs.get("max_val", 1.0))
        elif func not in RELU and func is not F.relu6:
            return func(*args, **kwargs)
        if low != 0.0:
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        in_place = bool(func in IN_PLACE or kwargs.get("inplace") or any(value is True for value in args[1:]))
        if in_place and x._is_view():  # of which torch lets no function of ours change a part
            return x.copy_(_Clamped.apply(x.clone(), high, self.rule, False))  # type: ignore[no-untyped-call]
        return _Clamped.apply(x, high, self.rule, in_place)  # type: ignore[no-untyped-call]


def ruled(x: Tensor, y: Tensor, rule: Rule, passes: Tensor) -> Tensor:
    """y, which is not differentiated but by the rule."""
    made: Tensor = _Ruled.apply(x, y, passes.to(y.dtype) if rule == "guided" else None)  # type: ignore[no-untyped-call]
    return made


@contextmanager
def backward_rule(model: nn.Module, rule: Rule, activations: Sequence[str] = ()) -> Iterator[Callable[[], None]]:
    """While open, a forward pass of the model is differentiated by a rule; yields a check to call after the pass.

    ReLU and ReLU6 follow it, whether modules or functions; other activations where they are named, by the class of
    their module: those are let through where their output is above 0 (Nielsen et al., equation 4).

    Raises:
        InputError: for a class that no module of the model has, for activations that are neither ReLU nor named, and,
            by the check, where the pass met none to apply the rule to.
    """
    kinds = {type(part).__name__ for part in model.modules()}
    for name in activations:
        if name not in kinds:
            raise unknown(f"activation of {class_name(model)}:", name, sorted(kinds))
    left = sorted({type(part).__name__ for part in model.modules() if isinstance(part, OTHERS)} - set(activations))
    if left:
        raise InputError(
            f"{class_name(model)} has activations {', '.join(left)}, which {rule} has no rule for; "
            f"name them with activations=[{', '.join(left)}] to let through what is above 0"
        )
    mode = _Rules(rule)
    met = 0

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal met
        met += 1
        return ruled(args[0], output.detach(), rule, output > 0)

    def check() -> None:
        if not mode.count + met:
            raise InputError(f"{class_name(model)} has no ReLU, which {rule} is about; name its activations")

    named = [part for part in model.modules() if type(part).__name__ in activations]
    handles = [part.register_forward_hook(after) for part in named]
    try:
        with mode:
            yield check
    finally:
        for handle in handles:
            handle.remove()
