"""DeepLIFT, and its rescale rule for `rules.Rules`.

The batch of a pass has the inputs x first, and then as many references x'. A multiplier m of a value says that its
difference Δ = x - x' contributes m Δ to the difference of the score.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.errors import NotApplicable
from interp_models.core.prepared import class_name
from interp_models.core.scoring import Score, Target, logits_of, per_image, resolve_target
from interp_models.explainers.base import EXPLAINERS, gradient_of, target_scores
from interp_models.explainers.calls import Call, Rule, plain, ruled
from interp_models.explainers.decomposed import Decomposed, epsilon_of, normed
from interp_models.explainers.gradients import Channels, PixelExplainer
from interp_models.explainers.operations import KINDS, Kind

TOLERANCE = 1e-3
"""Largest accepted difference between the sum of contributions and the change of the score, relative to the larger of
the latter and the sum of absolute contributions."""
SAME = 1e-6
"""Relative difference of a value and its reference below which a slope is a derivative."""


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and references of a batch."""
    return x[: len(x) // 2], x[len(x) // 2 :]


def _both(x: Tensor) -> Tensor:
    """For inputs and for references the same."""
    return torch.cat([x, x])


def slopes(x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
    """Δy / Δx, or the derivative where x is its reference."""
    (a, b), (c, d) = halves(x), halves(y)
    same = (a - b).abs() <= SAME * torch.maximum(a.abs(), b.abs())
    at_zero = halves(derivative)[0].nan_to_num(0.0, 0.0, 0.0)  # a root has none
    return torch.where(same, at_zero, (c - d) / torch.where(same, 1.0, a - b))


def rescale(call: Call) -> Any:
    """The rescale rule at a function of one value: the multiplier is its slope between reference and input (Shrikumar
    et al., equation 10)."""
    x = call.operands[0]
    if len(call.operands) != 1 or len(x) % 2:
        return call.refused(f"has {call.name} of features without a reference, for {call.rules.method}")
    with torch.enable_grad():
        start = x.detach().requires_grad_(True)
        y = call.of(start)
        derivative = torch.autograd.grad(y.sum(), start)[0] if y.requires_grad else torch.zeros_like(x)
    if y.shape != x.shape:
        return call.refused(f"has {call.name} that repeats features, which {call.rules.method} cannot rescale")
    slope = slopes(x.detach(), y.detach(), derivative)
    return call.ruled(lambda m: [m * _both(slope).to(m.dtype)], y.detach())


def _mids(x: Tensor) -> Tensor:
    """The mean of input and reference, for both."""
    a, b = halves(x)
    return _both((a + b) / 2)


def midpoint(call: Call) -> Any:
    """A product of two features: Δ(ab) = Δa · mean(b, b') + Δb · mean(a, a')."""
    count = len(call.operands)
    if count > 2 or any(len(x) % 2 for x in call.operands) or call.name == "prod":
        return call.refused(f"has {call.name} of more than two features, which {call.rules.method} has no rule for")
    kept = [_mids(x.detach()) for x in call.operands]
    again = Call(call.rules, call.name, call.func, call.args, call.kwargs, call.operands, call.in_place)

    def back(m: Tensor) -> Sequence[Tensor]:
        with torch.enable_grad():
            leaves = [x.requires_grad_(True) for x in kept]
            return torch.autograd.grad(again.of(*leaves), leaves, m)

    return call.ruled(back)


def ratio(call: Call) -> Any:
    """A quotient of two features: the product with the reciprocal, at the slope of the latter."""
    a, b = call.args[:2]
    if len(call.args) != 2 or call.in_place or any(len(x) % 2 for x in (a, b)) or call.kwargs:
        return call.refused(f"has {call.name} in a form that {call.rules.method} has no rule for")
    with call.rules:
        return a * b.reciprocal()


def largest(call: Call) -> Any:
    """A maximum over places: the input's winner gets max(y, y') - y', that of the reference y - max(y, y'); with two
    minima likewise."""
    x = call.operands[0]
    name = call.name
    value = call.value()
    y = value if isinstance(value, Tensor) else value[0]
    if name in ("topk", "sort") or len(x) % 2 or len(call.operands) != 1 or y.dim() == 0 or len(y) != len(x):
        return call.refused(f"has {name} in a form that {call.rules.method} has no rule for")
    choose = torch.minimum if name in ("amin", "min") else torch.maximum
    old, new = x.detach(), y.detach()

    def back(m: Tensor) -> list[Tensor]:
        (a, b), (c, d) = halves(old), halves(new)
        most = choose(c, d)
        first = halves(m)[0]
        with torch.enable_grad():
            start = old.clone().requires_grad_(True)
            found = call.of(start)
            found = found if isinstance(found, Tensor) else found[0]
        (given,) = torch.autograd.grad(found, start, torch.cat([first * (most - d), first * (c - most)]))
        total = sum(halves(given))
        same = a == b
        return [_both(torch.where(same, 0.0, total / torch.where(same, 1.0, a - b)))]

    made = ruled(new.clone(), back, [x])
    return made if isinstance(value, Tensor) else type(value)((made, *value[1:]))


def softmax(call: Call) -> Any:
    """exp by its slope, divided by its sum as a quotient."""
    x, dim = call.operands[0], call.arg(1, "dim")
    if len(x) % 2 or x.dim() < 2 or dim in (None, 0, -x.dim()):
        return call.refused(f"has {call.name} in a form that {call.rules.method} has no rule for")
    old, s = x.detach(), call.value()
    a, b = halves(old)
    shift = torch.maximum(a.amax(dim, keepdim=True), b.amax(dim, keepdim=True))
    e = (old - _both(shift)).exp()
    total = e.sum(dim, keepdim=True)
    slope = _both(slopes(old - _both(shift), e, e)).nan_to_num(0.0)  # of masked values, -∞

    def back(m: Tensor) -> list[Tensor]:
        c, d = halves(total)
        of_total = -(m * _mids(e)).sum(dim, keepdim=True) / _both(c * d)
        return [(m * _mids(1 / total) + of_total) * slope]

    return call.ruled(back, s)


class Rescale(Decomposed):
    """DeepLIFT's rules, so that contributions add up to the change of the score.

    Functions of one value follow the rescale rule. Products share a change equally between the two ways to make it one
    factor at a time. Norms, softmax and attention are handled as combinations of these.

    Args:
        model: the network.
        method: the name of the method.
        only: whether functions of one value alone have a rule, and everything else its derivative.
    """

    def __init__(self, model: nn.Module, method: str, *, only: bool = False) -> None:
        table: dict[Kind, Rule] = {
            "structure": plain, "sum": plain, "scale": plain, "linear": plain, "elementwise": rescale,
            "product": midpoint, "quotient": ratio, "maximum": largest, "softmax": softmax, "norm": self.norm,
            "statistic": self.length, "batch_norm": self.batch_norm, "attention": self.attention, "gated": self.gated,
        }  # fmt: skip
        if only:
            table = {**dict.fromkeys(KINDS.values(), plain), "scale": plain, "elementwise": self.where_paired}
        super().__init__(model, method, table)
        self.only = only

    def where_paired(self, call: Call) -> Any:
        """The rescale rule, or the derivative before features have a reference."""
        return call.plain() if len(call.operands) != 1 or len(call.operands[0]) % 2 else rescale(call)

    def batch_norm(self, call: Call) -> Any:
        """An affine map, with the statistics of training."""
        if call.arg(5, "training", False) or call.arg(1, "running_mean") is None:
            return call.refused(f"normalises by the mean of its batch, which {self.method} has no rule for")
        return call.plain()

    def norm(self, call: Call) -> Any:
        """A norm, by its single operations."""
        x = call.args[0]
        if call.name == "normalize" and call.arg(1, "p", 2) == 2 and not call.in_place:
            with self:
                square = (x * x).sum(dim=call.arg(2, "dim", 1), keepdim=True)
                return x * square.sqrt().clamp(min=call.arg(3, "eps", 1e-12)).reciprocal()
        with self:
            found = None if call.name in ("normalize", "instance_norm") else normed(call)
            if found is not None:
                centred, square, gain, shift = found
                y = centred * (square + epsilon_of(call)).rsqrt()
                y = y if gain is None else y * gain
                return y if shift is None else y + shift
        return call.refused(f"has {call.name} in a form that {self.method} has no rule for")

    def length(self, call: Call) -> Any:
        """A Euclidean norm, as the root of a sum of squares."""
        x, dim = call.args[0], call.arg(2, "dim")
        if "norm" not in call.name or call.arg(1, "ord", call.kwargs.get("p", 2)) not in (2, None) or dim is None:
            return call.refused(f"has {call.name} in a form that {self.method} has no rule for")
        with self:
            return (x * x).sum(dim=dim, keepdim=call.arg(3, "keepdim", False)).sqrt()


@EXPLAINERS.register("deeplift")
class DeepLIFT(PixelExplainer):
    """DeepLIFT: the contributions m (x - x') of the pixels to the difference of the scores of an image x and a
    reference x', by the linear and the rescale rule (Shrikumar et al., ICML 2017, sections 3.5.1 and 3.5.2).

    Contributions add up to y(x) - y(x'), which every call checks. The reference is an image of a constant value. The
    rules apply to functions as well as modules, and to modules that a network uses several times. The paper has no rule
    for products of features, as in attention, norms and gates: see docs/quirks.md.

    Args:
        model: any module that returns logits, with rules for all its operations.
        baseline: value of all pixels of the reference x'; 0 is black.
        channels: reduction of the colour channels; `sum` keeps the sum over the image.
        score: explain the target's `logit` or its `probability`.

    Raises:
        NotApplicable: for a network with an operation without a rule, or if the contributions do not add up.
    """

    needs = ("rescale",)
    passes = "2"

    def __init__(
        self, model: nn.Module, *, baseline: float = 0.0, channels: Channels = "sum", score: Score = "logit"
    ) -> None:
        super().__init__(model, channels=channels, score=score)
        self.baseline = baseline

    def raw(self, model: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """The contribution of every colour of every pixel."""
        x = torch.cat([inputs, torch.full_like(inputs, self.baseline)]).requires_grad_(True)
        n = len(inputs)
        rules = Rescale(model, "deeplift")
        with torch.enable_grad(), rules:
            output = model(rules.start(x))
            if target is None:
                target = resolve_target(None, logits_of(output).detach()[:n])
            scores = target_scores(output, self.score, per_image(target, n).repeat(2))
        rules.check(scores)
        multipliers = gradient_of(scores[:n].sum(), x, "the images")
        contributions = (multipliers * (x - x.roll(n, 0))).detach()[:n]
        check_complete("deeplift", model, contributions, scores[:n].detach(), scores[n:].detach())
        return contributions


def check_complete(
    method: str, model: nn.Module, contributions: Tensor, scores: Tensor, without: Tensor, where: str = ""
) -> None:
    """Check that contributions (B, ...) add up to the change of the scores (B,) from those without.

    Contributions and changes within the rounding of the scores themselves are accepted: a network that hardly depends
    on its input has no more exact change.

    Raises:
        NotApplicable: if they do not.
    """
    flat, device = contributions.flatten(1).double(), contributions.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else contributions.dtype
    rounded = f", or rounds too much in {dtype}: use float32" if torch.finfo(dtype).bits < 32 else ""
    rounding = torch.finfo(scores.dtype).eps * torch.maximum(scores.abs(), without.abs())
    columns = (flat.sum(dim=1), flat.abs().sum(dim=1), scores - without, rounding)
    for found, size, due, unsure in zip(*(x.tolist() for x in columns), strict=True):
        most = max(abs(due), size)
        if not (abs(found - due) <= TOLERANCE * most or most <= unsure):  # also NaN
            raise NotApplicable(
                f"{method}: contributions add up to {found:.4g}, the score changes by {due:.4g}: {where}"
                f"{class_name(model)} has operations that DeepLIFT's rescale rule does not cover{rounded}"
            )
