"""Layer-wise relevance propagation (LRP): the rules of all operations, for `rules.Rules`.

A value x with the multiplier m has the relevance R = x · m. Sums and averages share it out in proportion to what each
summand contributes, maxima give it to the largest value, and functions of one value pass it on as it is. Layers with
weights have the rules of `layer_rules`. A batch norm is merged into the convolution before it. If there is none, it
passes relevance on (with ε everywhere, it is a layer with ε). Products and attention are those of Achtibat et al., ICML
2024.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.errors import NotApplicable
from interp_models.core.prepared import class_name
from interp_models.explainers.calls import Call, Mark, Rule, Table, plain, ruled
from interp_models.explainers.decomposed import Decomposed, epsilon_of, normed
from interp_models.explainers.layer_rules import Box, Composite, Epsilon, Layer, Spread, share
from interp_models.explainers.operations import ACTIVATIONS, Kind
from interp_models.explainers.rules import Rules

DENSE = frozenset(["linear", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm"])
CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))


class Relevance(Decomposed):
    """LRP: what arrives at the image is relevance, namely that of the pixels as normalised by the network.

    Products and attention share relevance equally between their factors (Achtibat et al., propositions 3.2 and 3.3),
    but a gate gets none (Arras et al., WASSA 2017). Softmax has its own derivative, which is their proposition 3.1.
    Denominators, and the deviations that norms divide by, get none (their proposition 3.4).

    Args:
        model: the network.
        method: the name of the method.
        composite: the rules of layers with weights.
        without: kinds of operations that the method refuses.
        others: rules in place of those here.
    """

    def __init__(
        self,
        model: Any,
        method: str,
        composite: Composite,
        *,
        without: Sequence[Kind] = (),
        others: Table | None = None,
    ) -> None:
        table: dict[Kind, Rule] = {
            "structure": plain, "sum": plain, "scale": plain, "maximum": plain, "either": plain, "softmax": plain,
            "linear": self.weights, "batch_norm": self.batch_norm, "elementwise": elementwise, "product": product,
            "quotient": quotient, "norm": norm, "attention": self.attention, "gated": self.gated, **(others or {}),
        }  # fmt: skip
        table = {kind: rule for kind, rule in table.items() if kind not in without}
        bounds = isinstance(composite.first, Box)
        super().__init__(model, method, table, relevance=True, bounds=bounds)
        self.composite = composite

    def weights(self, call: Call) -> Any:
        """The rule at a layer with weights."""
        first = (mark := self.mark(call.operands[0])) is not None and mark.raw
        dense, convolution = call.name in DENSE, call.name in CONVOLUTIONS
        rule = self.composite.convolution if convolution else self.composite.dense
        special = self.composite.first if first and (convolution or (dense and self.composite.first_dense)) else None
        if first and special is None:
            call = self._entered(call)
        if not (dense or convolution):
            return call.plain()  # einsum and others, with a constant: ε = 0
        return self.spreading(call, parts(call), special or rule)

    def spreading(self, call: Call, found: tuple[Any, Any, Any], rule: Spread) -> Tensor:
        """The output of a layer, with a rule."""
        f, w, b = found
        x = call.operands[0]
        if isinstance(rule, Epsilon) and call.name != "merged":  # the derivative is enough
            made, epsilon = call.plain(), rule.epsilon
            z = self.keep(made)
            result = ruled(made.detach(), lambda m: [m * share(z.value, z.value, epsilon)], [made]) if epsilon else made
        else:
            value = call.value()
            kept, z = self.keep(x), self.keep(value)
            bounds = mark.bounds if (mark := self.mark(x)) is not None else None

            def back(m: Tensor) -> list[Tensor]:
                wide = torch.promote_types(kept.value.dtype, z.value.dtype)
                bias = None if b is None else b.detach().to(wide)
                layer = Layer(f, kept.value.to(wide), w.detach().to(wide), bias, z.value.to(wide), bounds)
                with torch.autocast(m.device.type, enabled=False):
                    return [rule(layer, m.to(wide) * layer.z).to(kept.value.dtype)]

            result = call.ruled(back, value)
        if call.name in CONVOLUTIONS:
            self.set_mark(result, Mark(call=call))
        return result

    def batch_norm(self, call: Call) -> Any:
        """A batch norm, merged into the convolution before it where there is one."""
        x, mean, variance = call.operands[0], call.arg(1, "running_mean"), call.arg(2, "running_var")
        if call.arg(5, "training", False) or mean is None or variance is None:
            return call.refused(f"normalises by the mean of its batch, which {self.method} has no rule for")
        gain, shift = call.arg(3, "weight"), call.arg(4, "bias")
        scale = (variance.double() + call.arg(7, "eps", 1e-5)).rsqrt()
        scale = scale if gain is None else scale * gain.double()
        add = -mean.double() * scale if shift is None else shift.double() - mean.double() * scale
        before = mark.call if (mark := self.mark(x)) is not None else None
        if before is None:  # as α and β on it would multiply relevance at every batch norm
            return call.plain() if isinstance(self.composite.convolution, Epsilon) else elementwise(call)
        f, w, b = parts(before)
        source = before.operands[0]
        first = (mark := self.mark(source)) is not None and mark.raw
        rule = (self.composite.first if first else None) or self.composite.convolution
        if "transpose" in before.name or (isinstance(rule, Epsilon) and not rule.epsilon):
            return call.plain()
        wide = (-1, *(1,) * (x.dim() - 2))
        bias = add.view(wide) if b is None else add.view(wide) + b.double() * scale.view(wide)
        weight = w.double() * scale.view(-1, *(1,) * (w.dim() - 1))
        value = call.value()
        merged = Call(self, "merged", lambda _: value, (source,), {}, [source])
        return self.spreading(merged, (f, weight.to(w.dtype), bias.to(w.dtype)), rule)


def parts(call: Call) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor | None]:
    """f, w and b of a layer with weights, see `Layer`."""
    if call.name == "linear":
        return F.linear, call.arg(1, "weight"), call.arg(2, "bias")
    if call.name in CONVOLUTIONS:
        w, b, further = call.arg(1, "weight"), call.arg(2, "bias"), call.args[3:]
        options = {key: value for key, value in call.kwargs.items() if key not in ("input", "weight", "bias")}
        b = b if b is None else b.view(-1, *(1,) * (w.dim() - 2))
        return (lambda x, w: call.func(x, w, None, *further, **options)), w, b
    b = call.args[0] if call.name == "addmm" else None
    left, right = call.args[1:3] if call.name == "addmm" else call.args[:2]
    left, right = (right, left) if call.name == "rmatmul" else (left, right)
    if left is call.operands[0]:
        return torch.matmul, right, b
    return (lambda x, w: torch.matmul(w, x)), left, b


def elementwise(call: Call) -> Any:
    """A function of one value passes relevance on: m = m · y / x."""
    if call.name not in ACTIVATIONS and call.name != "batch_norm":
        return call.refused(f"has {call.name}, a function that {call.rules.method} has no rule for")
    return unchanged(call)


def unchanged(call: Call) -> Any:
    """Relevance of each value for that at its place."""
    if len(call.operands) != 1:
        return call.refused(f"has {call.name} of several features, which {call.rules.method} has no rule for")
    x, value = call.operands[0], call.value()
    if value.shape != x.shape:
        return call.refused(f"has {call.name} that repeats features, which {call.rules.method} has no rule for")
    old, y = call.rules.keep(x), call.rules.keep(value)

    def back(m: Tensor) -> list[Tensor]:
        zero = old.value == 0
        return [m * torch.where(zero, 0.0, y.value / torch.where(zero, 1.0, old.value))]

    if call.in_place:
        old.value = old.value.clone()
    return call.ruled(back, value)


def product(call: Call) -> Any:
    """A product of features shares relevance equally between them; a gate, the output of a sigmoid, gets none."""
    gates = [(mark := call.rules.mark(x)) is not None and mark.gate for x in call.operands]
    if any(gates) and not all(gates):
        made = call.of(*(x.detach() if gate else x for x, gate in zip(call.operands, gates, strict=True)))
        return call.args[0].copy_(made) if call.in_place else made
    count = 2 if len(call.operands) == 1 else len(call.operands)
    made = call.of(*call.operands)
    result = ruled(made.detach(), lambda m: [m / count], [made])
    return call.args[0].copy_(result) if call.in_place else result


def quotient(call: Call) -> Any:
    """A quotient gives all relevance to the numerator."""
    if len(call.args) != 2 or call.in_place or call.name.startswith("r"):
        return call.refused(f"has {call.name} in a form that {call.rules.method} has no rule for")
    return call.func(call.args[0], call.args[1].detach(), **call.kwargs)


def norm(call: Call) -> Any:
    """A norm whose divisor gets no relevance."""
    if call.name == "normalize" and not call.in_place:
        x = call.args[0]
        return x * (call.plain().detach() / torch.where(x == 0, 1.0, x.detach()))
    found = normed(call)
    if found is None:
        return call.refused(f"has {call.name} in a form that {call.rules.method} has no rule for")
    centred, square, gain, shift = found
    y = centred * (square.detach() + epsilon_of(call)).rsqrt().to(centred.dtype)
    y = y if gain is None else y * gain
    return (y if shift is None else y + shift).view_as(call.args[0])


def seeded(logits: Tensor, targets: Tensor, others: float | None) -> Tensor:
    """What to differentiate so that relevance starts as 1 at the target class, and as `others` at every other one; None
    is -1/C for C classes."""
    start = torch.full_like(logits, -1 / logits.shape[1] if others is None else others)
    start = start.scatter(1, targets[:, None], 1.0)
    values = logits.detach()
    return (torch.where(values == 0, 0.0, start / torch.where(values == 0, 1.0, values)) * logits).sum()


def finite(relevance: Tensor, rules: Rules) -> Tensor:
    """Relevance, if it is finite everywhere.

    Raises:
        NotApplicable: if it is not.
    """
    if not bool(torch.isfinite(relevance).all()):
        dtype = str(relevance.dtype).removeprefix("torch.")
        hint = "" if relevance.dtype == torch.float64 else "; try float64 images and weights"
        raise NotApplicable(
            f"{rules.method}: relevance in {class_name(rules.model)} is infinite or NaN in {dtype}{hint}"
        )
    return relevance
