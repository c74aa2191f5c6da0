"""Modified backward rules at activations: deconvnet and guided backpropagation."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp_models.core.eager import HIDING, RECOMPUTES, name_of, nodes_of
from interp_models.core.errors import NotApplicable, unknown
from interp_models.core.prepared import class_name

Rule = Literal["deconvnet", "guided"]

RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
HARDTANH = (F.hardtanh, F.hardtanh_)
"""Functions that compute ReLU6."""
IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_, F.hardtanh_, torch.clamp_, Tensor.clamp_)
CLAMP = (torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clamp_min, Tensor.clamp_min)
"""Functions that some networks use as ReLU or ReLU6."""
OTHERS = (
    nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid,
    nn.LeakyReLU, nn.PReLU, nn.LogSigmoid, nn.Softsign, nn.RReLU, nn.Threshold,
)  # fmt: skip
"""Activation modules that the papers have no rule for."""
OTHER_FUNCTIONS = (
    F.elu, F.elu_, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid,
    F.leaky_relu, F.leaky_relu_, F.prelu, F.logsigmoid, F.softsign, F.rrelu, F.threshold, torch.sigmoid, torch.tanh,
    torch.selu, torch.celu, torch.prelu, Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.tanh_,
)  # fmt: skip
"""Activation functions that the papers have no rule for."""


UNRULED = {
    "Relu", "Hardtanh", "Threshold", "Silu", "Gelu", "Elu", "LeakyRelu", "Hardswish", "Hardsigmoid", "Mish", "Softplus",
    "PreluKernel", "Sigmoid", "Tanh",
}  # fmt: skip
"""Operations of activations in the autograd graph; with the rule they have other names."""


class _Ruled(torch.autograd.Function):
    """An activation with the modified backward: ReLU(R) of the incoming gradient R; guided, only where `passes`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, passes: Tensor | None) -> Tensor:
        ctx.passes = passes
        ctx.set_materialize_grads(False)  # where a later part lets no gradient through, it must not become zeros
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradients[0] is None:
            return None, None, None
        relevance = gradients[0].clamp(min=0)
        return relevance if ctx.passes is None else relevance * ctx.passes, None, None


class _Clamped(torch.autograd.Function):
    """A ReLU or ReLU6 with the modified backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, rule: Rule, in_place: bool) -> Tensor:
        y = x.clamp_(0.0, high) if in_place else x.clamp(0.0, high)
        if in_place:
            ctx.mark_dirty(x)
        if rule == "guided":
            ctx.save_for_backward(y)
        ctx.high = high
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if gradients[0] is None:
            return None, None, None, None
        if not ctx.saved_tensors:
            return gradients[0].clamp(min=0), None, None, None
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], y, 0.0, ctx.high).clamp_(min=0), None, None, None


class _Rules(TorchFunctionMode):
    """Applies a rule to every ReLU and ReLU6, module or function, and counts them."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule, self.count = rule, 0
        self.named = 0
        """Number of running modules that were named as activations. Functions inside them are left alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        low, high = 0.0, 6.0 if func is F.relu6 else torch.inf
        if func in HARDTANH:
            low = float(args[1] if len(args) > 1 else kwargs.get("min_val", -1.0))
            high = float(args[2] if len(args) > 2 else kwargs.get("max_val", 1.0))
        if not self.named and (func in OTHER_FUNCTIONS or (func in HARDTANH and low != 0.0)):
            raise NotApplicable(
                f"the function {func.__name__} is an activation that {self.rule} has no rule for; use its module "
                "instead, and name that in activations="
            )
        if func in CLAMP:
            low, high = (_number(args, kwargs, at, name) for at, name in ((1, "min"), (2, "max")))
            high = torch.inf if math.isnan(high) else high
        if self.named or low != 0.0 or high <= 0.0 or (func not in (*RELU, *HARDTANH, *CLAMP) and func is not F.relu6):
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        in_place = bool(func in IN_PLACE or kwargs.get("inplace") or any(value is True for value in args[1:]))
        if in_place and x._is_view():  # torch does not let a custom function modify a view
            return x.copy_(_Clamped.apply(x.clone(), high, self.rule, False))  # type: ignore[no-untyped-call]
        return _Clamped.apply(x, high, self.rule, in_place)  # type: ignore[no-untyped-call]


def _number(args: Any, kwargs: Any, at: int, name: str) -> float:
    """A numeric argument. NaN if it is not given, -inf if it is a tensor."""
    value = args[at] if len(args) > at else kwargs.get(name)
    return math.nan if value is None else float(value) if isinstance(value, int | float) else -math.inf


def ruled(x: Tensor, y: Tensor, rule: Rule, passes: Tensor) -> Tensor:
    """y = activation(x), whose backward follows the rule; `passes` marks where the input passes."""
    made: Tensor = _Ruled.apply(x, y, passes.to(y.dtype) if rule == "guided" else None)  # type: ignore[no-untyped-call]
    return made


def _unruled(part: nn.Module) -> bool:
    return isinstance(part, OTHERS) or (isinstance(part, nn.Hardtanh) and part.min_val != 0)


@contextmanager
def backward_rule(model: nn.Module, rule: Rule, activations: Sequence[str] = ()) -> Iterator[Callable[[Tensor], None]]:
    """While open, the backward of a forward pass follows a rule at activations.

    ReLU and ReLU6 follow it, as modules and as functions. Further activation modules follow it if their class is named;
    guided backpropagation passes the gradient where their output is above 0 (Nielsen et al., equation 4).

    Args:
        model: the network.
        rule: `deconvnet` or `guided`.
        activations: names of further activation classes.

    Yields:
        A check to call with the score after the pass. It raises `NotApplicable` if the pass had no activation to apply
        the rule to, or one without the rule.

    Raises:
        InputError: if no module of the model has a named class.
        NotApplicable: if the model has other activations that are not named.
    """
    kinds = {type(part).__name__ for part in model.modules()}
    for name in activations:
        if name not in kinds:
            raise unknown(f"activation of {class_name(model)}:", name, sorted(kinds))
    left = sorted({type(part).__name__ for part in model.modules() if _unruled(part)} - set(activations))
    if left:
        raise NotApplicable(
            f"{class_name(model)} has activations {', '.join(left)}, which {rule} has no rule for; "
            f"name them with activations=[{', '.join(left)}] to treat them like ReLU"
        )
    mode = _Rules(rule)
    given: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: Any) -> Any:
        mode.named += 1
        given[module] = args[0]
        return (args[0].clone(), *args[1:])  # the activation may work in place

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        mode.named -= 1
        mode.count += 1
        return ruled(given.pop(module), output.detach(), rule, output > 0)

    def check(score: Tensor) -> None:
        left = {name_of(node) for node in nodes_of(score.grad_fn)} if score.grad_fn is not None else set()
        if any("CheckpointFunction" in name for name in left):
            raise NotApplicable(RECOMPUTES)
        if any(hidden in name for name in left for hidden in HIDING):
            raise NotApplicable(
                f"{class_name(model)} has parts made by torch.jit or torch.compile, whose activations {rule} cannot "
                "reach"
            )
        if not mode.count:
            raise NotApplicable(
                f"{class_name(model)} has no ReLU to apply {rule} to; name its activations with activations="
            )
        if plain := sorted(left & UNRULED):
            raise NotApplicable(
                f"{class_name(model)} computes {', '.join(plain)} where {rule} cannot reach it; use modules for its "
                "activations"
            )

    kept = (nn.ReLU, nn.ReLU6)  # `_Rules` handles these, named or not
    named = [part for part in model.modules() if type(part).__name__ in activations and not isinstance(part, kept)]
    handles = [part.register_forward_pre_hook(before) for part in named]
    handles += [part.register_forward_hook(after) for part in named]
    try:
        with mode:
            yield check
    finally:
        for handle in handles:
            handle.remove()
