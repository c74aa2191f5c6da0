"""Rules of LRP at layers with weights w and outputs z = Σ_i x_i w_i + b, see `relevance` for what they share out.

x⁺ and x⁻ are the positive and the negative part:

- ε: R_i = x_i w_i R / (z + ε sign z).
- α, β: R_i = α (x_i w_i)⁺ R / Σ (x w)⁺ - β (x_i w_i)⁻ R / Σ (x w)⁻; z⁺ is α = 1, β = 0.
- γ: as ε, with weights w + γ w⁺ where they add to z > 0, see `Gamma`.
- box (z^B), at pixels x between l and h: R_i = (x_i w_i - l w_i⁺ - h w_i⁻) R / Σ of the same.
- flat: R_i = R / (number of inputs).

Sources: Bach et al., PLOS ONE 2015 (ε, α and β); Montavon et al., Pattern Recognition 2017 (z⁺, box); Montavon et al.
2019 (γ); Lapuschkin et al., Nature Communications 2019 (flat).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    """α, β. The bias gets its share unless `bias` is False."""

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
    """Box, at the first layer. The bias gets no relevance."""

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
