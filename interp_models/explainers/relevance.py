"""Rules of layer-wise relevance propagation (LRP), for `rules.Rules`.

A value x with the multiplier m has the relevance R = x · m. Sums and averages share it out in proportion to what each
summand contributes, maxima give it to the largest value, and functions of one value pass it on as it is. The rules of
layers with weights w and outputs z = Σ_i x_i w_i + b are below; x⁺ and x⁻ are the positive and the negative part:

- ε: R_i = x_i w_i R / (z + ε sign z).
- α, β: R_i = α (x_i w_i)⁺ R / Σ (x w)⁺ - β (x_i w_i)⁻ R / Σ (x w)⁻; z⁺ is α = 1, β = 0.
- γ: as ε, with weights w + γ w⁺ where they add to z > 0, see `Gamma`.
- box (z^B), at pixels x between l and h: R_i = (x_i w_i - l w_i⁺ - h w_i⁻) R / Σ of the same.
- flat: R_i = R / (number of inputs).

A batch norm is merged into the convolution before it. If there is none, it passes relevance on (with ε everywhere, it
is a layer with ε). Sources: Bach et al., PLOS ONE 2015 (ε, α and
β); Montavon et al., Pattern Recognition 2017 (z⁺, box); Montavon et al. 2019 (γ); Lapuschkin et al., Nature
Communications 2019 (flat); Achtibat et al., ICML 2024 (attention).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.prepared import class_name
from interp_models.core.scoring import Target, logits_of, resolve_target
from interp_models.explainers.features import OfLayer, captured
from interp_models.explainers.operations import ACTIVATIONS, Kind
from interp_models.explainers.rules import Call, Mark, Rule, Rules, Table, plain, ruled

DENSE = frozenset(["linear", "matmul", "rmatmul", "mm", "bmm", "mv", "addmm"])
CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))


@dataclass
class Layer:
    """A layer with weights: z = f(x, w) + b."""

    f: Callable[[Tensor, Tensor], Tensor]
    """Linear in x and in w."""
    x: Tensor
    w: Tensor
    b: Tensor | None
    """Shaped as z, or as one value per channel that is."""
    z: Tensor
    bounds: tuple[Tensor, Tensor] | None
    """Of the image's own values, those of a black and of a white image."""


Spread = Callable[[Layer, Tensor], Tensor]
"""From a layer and the relevance R of z to the multipliers of x; `Composite.first` gives the relevance of x."""


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z + ε sign z, with the sign of 0 as 1."""
    return z + torch.where(z < 0, -epsilon, epsilon)


def share(r: Tensor, z: Tensor, epsilon: float) -> Tensor:
    """R / (z + ε sign z), and 0 where that divides by 0."""
    below = stabilised(z, epsilon)
    return torch.where(below == 0, 0.0, r / torch.where(below == 0, 1.0, below))


def spread(
    layer: Layer, pairs: Sequence[tuple[Tensor, Tensor]], b: Tensor | None, r: Tensor, epsilon: float
) -> list[Tensor]:
    """Multipliers of the x of each pair (x, w), for relevance shared by z = Σ f(x, w) + b over the pairs."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(True) for x, _ in pairs]
        parts = [layer.f(x, w) for x, (_, w) in zip(leaves, pairs, strict=True)]
        z = sum(parts[1:], parts[0])
    total = z.detach() if b is None else z.detach() + b
    return list(torch.autograd.grad(z, leaves, share(r, total, epsilon)))


def of_signs(x: Tensor, multipliers: Sequence[Tensor]) -> Tensor:
    """Multipliers of x from those of its positive and its negative part."""
    found = torch.where(x > 0, multipliers[0], 0.0)
    return found if len(multipliers) == 1 else torch.where(x < 0, multipliers[1], found)


def _pairs(x: Tensor, above: Tensor, below: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The parts of x with the weights of each; the negative one only if there is one."""
    pairs = [(x.clamp(min=0), above)]
    return [*pairs, (x.clamp(max=0), below)] if bool((x < 0).any()) else pairs


@dataclass(frozen=True)
class Epsilon:
    """ε."""

    epsilon: float

    def __call__(self, layer: Layer, r: Tensor) -> Tensor:
        """The multipliers of x."""
        return spread(layer, [(layer.x, layer.w)], layer.b, r, self.epsilon)[0]


@dataclass(frozen=True)
class AlphaBeta:
    """α, β. The bias takes its share unless `bias` is False."""

    alpha: float
    beta: float
    epsilon: float
    bias: bool = True

    def __call__(self, layer: Layer, r: Tensor) -> Tensor:
        """The multipliers of x."""
        x, above, below = layer.x, layer.w.clamp(min=0), layer.w.clamp(max=0)
        b = layer.b if self.bias else None
        for_it = spread(layer, _pairs(x, above, below), b if b is None else b.clamp(min=0), r, self.epsilon)
        found = of_signs(x, for_it)
        if not self.beta:
            return found if self.alpha == 1 else self.alpha * found
        against = spread(layer, _pairs(x, below, above), b if b is None else b.clamp(max=0), r, self.epsilon)
        return self.alpha * found - self.beta * of_signs(x, against)


@dataclass(frozen=True)
class Gamma:
    """γ, also for negative inputs and outputs (Andéol et al. 2021): where z > 0, weights w + γ w⁺ for x⁺ and w + γ w⁻
    for x⁻; where z < 0 the reverse."""

    gamma: float
    epsilon: float

    def __call__(self, layer: Layer, r: Tensor) -> Tensor:
        """The multipliers of x."""
        x, w, b = layer.x, layer.w, layer.b
        above, below = w + self.gamma * w.clamp(min=0), w + self.gamma * w.clamp(max=0)
        found = torch.zeros_like(x)
        for sign, first, second in ((1, above, below), (-1, below, above)):
            some = r * (layer.z * sign > 0)
            part = b if b is None else b.clamp(min=0) if sign > 0 else b.clamp(max=0)
            bias = b if b is None or part is None else b + self.gamma * part
            found = found + of_signs(x, spread(layer, _pairs(x, first, second), bias, some, self.epsilon))
        return found


@dataclass(frozen=True)
class Box:
    """Box, at the first layer. The bias takes nothing."""

    epsilon: float

    def __call__(self, layer: Layer, r: Tensor) -> Tensor:
        """The relevance of x."""
        assert layer.bounds is not None
        x, w = layer.x, layer.w
        low, high = torch.minimum(*layer.bounds).to(x.dtype), torch.maximum(*layer.bounds).to(x.dtype)
        pairs = [(x, w), (-low, w.clamp(min=0)), (-high, w.clamp(max=0))]
        found = spread(layer, pairs, None, r, self.epsilon)
        return sum((x * m for (x, _), m in zip(pairs, found, strict=True)), torch.zeros_like(x))


@dataclass(frozen=True)
class Flat:
    """Flat, at the first layer."""

    epsilon: float

    def __call__(self, layer: Layer, r: Tensor) -> Tensor:
        """The relevance of x."""
        return spread(layer, [(torch.ones_like(layer.x), torch.ones_like(layer.w))], None, r, self.epsilon)[0]


@dataclass(frozen=True)
class Composite:
    """The rules of layers with weights.

    Args:
        convolution: that of convolutions.
        dense: that of linear layers and products with a constant matrix.
        first: that of layers that read the image's own values, or None for the same as elsewhere. It gives relevance.
        first_dense: whether `first` is also for linear layers.
    """

    convolution: Spread
    dense: Spread
    first: Spread | None = None
    first_dense: bool = True


class Decomposed(Rules):
    """Abstract: rules that follow a compound operation through its single operations."""

    def attention(self, call: Call) -> Any:
        """Attention, by its single operations."""
        found = attended(call)
        if found is None:
            return call.refused(f"has {call.name} in a form that {self.method} has no rule for")
        with self:
            return found()

    def gated(self, call: Call) -> Any:
        """A gated linear unit, by its single operations."""
        with self:
            one, gate = call.args[0].chunk(2, dim=call.arg(1, "dim", -1))
            return one * gate.sigmoid()


class Relevance(Decomposed):
    """LRP: what leaves the network at the image is relevance, at the image as normalised by the network.

    Products and attention share relevance equally between their factors (Achtibat et al., proposition 3.3), but a gate
    takes none (Arras et al., WASSA 2017, section 3.3). Softmax has
    its own derivative, which is their equation 13. Denominators, and the deviations that norms divide by, take none
    (their proposition 3.4).

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
    """A product of features shares relevance equally between them; a gate, the output of a sigmoid, takes none."""
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
    """A norm whose divisor takes no relevance."""
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


def epsilon_of(call: Call) -> float:
    """What a norm adds before it divides."""
    place = {"layer_norm": 4, "group_norm": 4, "instance_norm": 7, "rms_norm": 3}.get(call.name, 0)
    found = call.arg(place, "eps")
    return torch.finfo(call.args[0].dtype).eps if found is None else float(found)


def normed(call: Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """What a norm divides, the mean square that it divides by, its gain and its shift; None for another norm."""
    x = call.args[0] if call.args else call.kwargs["input"]
    if call.name in ("layer_norm", "rms_norm"):
        dims = tuple(range(-len(call.arg(1, "normalized_shape")), 0))
        gain, shift = call.arg(2, "weight"), call.arg(3, "bias") if call.name == "layer_norm" else None
        centred = x - x.mean(dim=dims, keepdim=True) if call.name == "layer_norm" else x
        return centred, (centred * centred).mean(dim=dims, keepdim=True), gain, shift
    if call.name == "group_norm":
        groups, gain, shift = call.arg(1, "num_groups"), call.arg(2, "weight"), call.arg(3, "bias")
        parted = x.reshape(len(x), groups, -1)
        centred = parted - parted.mean(dim=2, keepdim=True)
        square = (centred * centred).mean(dim=2, keepdim=True).expand_as(parted).reshape(x.shape)
        per_channel = [one if one is None else one.view(-1, *(1,) * (x.dim() - 2)) for one in (gain, shift)]
        return centred.reshape(x.shape), square, per_channel[0], per_channel[1]
    return None


def attended(call: Call) -> Callable[[], Any] | None:
    """Attention as single operations, to run under the rules; None for another form of it."""
    if call.name == "scaled_dot_product_attention":
        q, k, v = (call.arg(i, name) for i, name in enumerate(("query", "key", "value")))
        if call.arg(5, "is_causal", False) or call.kwargs.get("enable_gqa"):
            return None
        mask, scale = call.arg(3, "attn_mask"), call.kwargs.get("scale")
        return lambda: _attend(q, k, v, mask, scale)
    x, key, value, dim, heads, weight, bias = ([*call.args] + [None] * 7)[:7]
    plain_form = (
        x is key
        and key is value
        and weight is not None
        and not any(
            call.kwargs.get(name) is not None
            for name in ("key_padding_mask", "attn_mask", "static_k", "static_v", "q_proj_weight")
        )
    )
    extra = list(call.args[7:10])
    if not plain_form or any(one is not None and one is not False for one in extra) or len(call.args) < 13:
        return None
    out_weight, out_bias = call.args[11], call.args[12]
    needed = call.kwargs.get("need_weights", True)

    def run() -> Any:
        length, batch, _ = x.shape
        q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        q, k, v = (one.reshape(length, batch, heads, dim // heads).permute(1, 2, 0, 3) for one in (q, k, v))
        made = _attend(q, k, v, None, None).permute(2, 0, 1, 3).reshape(length, batch, dim)
        return F.linear(made, out_weight, out_bias), None

    return None if needed else run


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    a = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        a = a.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else a + mask
    return a.softmax(dim=-1) @ v


def seeded(logits: Tensor, targets: Tensor, others: float | None) -> Tensor:
    """What to differentiate so that relevance starts as 1 at the target class, and as `others` at every other one; None
    is -1/C for C classes."""
    start = torch.full_like(logits, -1 / logits.shape[1] if others is None else others)
    start = start.scatter(1, targets[:, None], 1.0)
    values = logits.detach()
    return (torch.where(values == 0, 0.0, start / torch.where(values == 0, 1.0, values)) * logits).sum()


def relevance_at(
    explainer: OfLayer, rules: Rules, inputs: Tensor, target: Target, *, others: float | None
) -> tuple[Tensor, Tensor]:
    """Feature maps A of the target layer and their relevance, float32 or better (B, C, h, w), by one pass. Relevance
    starts as in `seeded`.

    Raises:
        NotApplicable: if an operation after the layer has no rule, or the score does not depend on the layer.
    """
    layer = explainer.target_layer(inputs)
    with torch.no_grad(), captured(layer, gradient=True) as outputs, rules:
        output = explainer.model(inputs)
    if not outputs:
        raise InputError(f"layer {layer.name} was not used in the forward pass")
    raw, logits = outputs[0], logits_of(output)
    rules.check(logits)
    m = None
    if logits.requires_grad:
        with torch.enable_grad():
            score = seeded(logits, resolve_target(target, logits.detach()), others)
        (m,) = torch.autograd.grad(score, raw, allow_unused=True)
    if m is None:
        raise NotApplicable(f"no gradient path from the score back to layer {layer.name}")
    a, m = layer.feature_map(raw.detach()), layer.feature_map(finite(m, rules))
    a, m = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, m))
    return a, a * m


def finite(relevance: Tensor, rules: Rules) -> Tensor:
    """Relevance, if it is finite everywhere.

    Raises:
        NotApplicable: if it is not.
    """
    if not bool(torch.isfinite(relevance).all()):
        raise NotApplicable(
            f"{rules.method}: relevance in {class_name(rules.model)} exceeds {relevance.dtype}; use a higher precision"
        )
    return relevance
