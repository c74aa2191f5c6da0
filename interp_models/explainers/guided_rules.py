"""The rules of deconvnet and guided backpropagation at activations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp_models.core.eager import own_thread
from interp_models.core.errors import NotApplicable, unknown
from interp_models.core.prepared import class_name
from interp_models.explainers.calls import Call, InPlace, Kept, Mark, Rule, plain, ruled
from interp_models.explainers.operations import DIVIDES, LAST, POWERS, Kind
from interp_models.explainers.rules import Rules

GUARD = 1e-3
"""Largest lower bound of a clamp that only guards a division."""

Backward = Literal["deconvnet", "guided_backprop"]


class BackwardRules(Rules):
    """The gradient, but with the rule of deconvnet or guided backpropagation at ReLU and ReLU6, however written.

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
            made: Tensor = InPlace.apply(back, call, x)  # type: ignore[no-untyped-call]
            value = made
        else:
            value = call.value()
            made = call.ruled(back, value)
        if self.rule == "guided_backprop":
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
        passes = (y > 0).to(y.dtype) if self.rule == "guided_backprop" else None
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
