"""Extremal perturbations: the smooth mask of a given area that keeps or lowers the score most."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp_models.core.errors import InputError
from interp_models.core.scoring import Score, Target
from interp_models.explainers.base import EXPLAINERS, Explainer, gradient_of, no_path, target_scores
from interp_models.explainers.combinators import pairs, resolved

LEVELS = 8
"""Levels of the pyramid of blurred images."""
BLUR = 20.0
"""Standard deviation of the strongest blur, in pixels."""
COLDNESS = 20.0
"""T of the smooth maximum."""


@EXPLAINERS.register("extremal_perturbation")
class ExtremalPerturbation(Explainer):
    """Extremal perturbation: S = argmax over masks m of area a of y(m ⊗ x) (Fong, Patrick and Vedaldi, ICCV 2019),
    averaged over several a.

    m ⊗ x takes each pixel from a pyramid of blurred images, unblurred where m is 1. m is the smooth maximum of copies
    of a bump, one every `cell` pixels, with a height in [0, 1]. SGD with momentum maximises the energy
    y - λ mean (sort(m) - r_a)², where r_a is 1 for the share a and 0 elsewhere. All heights start at 1; λ starts at 300
    and grows by 0.35 % per step. Every other step sees the image mirrored. All numbers are those of TorchRay, the
    authors' code. Nothing is random, and images do not influence each other. Each step takes one forward and one
    backward pass per area. The map has the resolution of the input.

    Args:
        model: any module that returns logits.
        areas: shares a of the image and its margin of `sigma` pixels.
        steps: steps of SGD.
        variant: `preserve` keeps the mask's inside and maximises the score; `delete` blurs it and minimises the score.
        cell: distance between bumps in pixels.
        sigma: size of a bump in pixels.
        score: optimise the target's `logit` or its `probability`.
        batch: masks that are optimised together; None chooses it for the device.

    Raises:
        NotApplicable: if the score does not depend on the images through differentiable operations.
    """

    passes = "steps * len(areas)"
    back_to_images = True
    amplifies_rounding = True
    small: ClassVar[Mapping[str, Any]] = {"steps": 4, "areas": [0.1, 0.3], "batch": 4}

    def __init__(
        self,
        model: nn.Module,
        *,
        areas: tuple[float, ...] = (0.1,),
        steps: int = 800,
        variant: Literal["preserve", "delete"] = "preserve",
        cell: int = 7,
        sigma: int = 21,
        score: Score = "logit",
        batch: int | None = None,
    ) -> None:
        super().__init__(model, score=score)
        if not isinstance(areas, list | tuple) or not areas or not all(0 < area < 1 for area in areas):
            raise InputError(f"extremal_perturbation: areas must be a list of numbers between 0 and 1; got {areas}")
        if min(steps, cell, sigma, 1 if batch is None else batch) < 1:
            raise InputError(
                f"extremal_perturbation needs steps, cell, sigma, batch >= 1; got {steps}, {cell}, {sigma}, {batch}"
            )
        self.areas, self.steps, self.variant = tuple(areas), steps, variant
        self.cell, self.sigma, self.batch = cell, sigma, batch

    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        model = self.prepared(inputs)
        targets = resolved(model, inputs, target)
        wide = torch.promote_types(inputs.dtype, torch.float32)
        total = inputs.new_zeros(len(inputs), *inputs.shape[-2:], dtype=wide)
        for chunk in pairs(inputs, len(self.areas), self.batch):
            a, b = chunk // len(inputs), chunk % len(inputs)
            total.index_add_(0, b, self._masks(model, inputs[b], targets[b], [self.areas[n] for n in a.tolist()]))
        return total / len(self.areas)

    def _masks(self, model: nn.Module, images: Tensor, targets: Tensor, areas: list[float]) -> Tensor:
        """The mask of an area for each image (B, H, W)."""
        bumps = Bumps(images, self.cell, self.sigma)
        levels = pyramid(images.to(bumps.weight))
        heights = torch.ones(len(images), *bumps.cells, dtype=levels.dtype, device=images.device, requires_grad=True)
        count = math.prod(bumps.size)
        ones = torch.tensor([int(count * (1 - area)) for area in areas], device=images.device)  # where ones begin
        wanted = (torch.arange(count, device=images.device) >= ones[:, None]).to(levels.dtype)
        optimizer = torch.optim.SGD([heights], lr=0.01, momentum=0.9, dampening=0.9)
        weight = 300.0
        for step in range(self.steps):
            with torch.enable_grad():
                masks = bumps.masks(heights)
                inner = bumps.cropped(masks)
                kept = inner if self.variant == "preserve" else 1 - inner
                seen = blended(levels, kept).to(images.dtype)
                y = target_scores(model(seen if step % 2 else seen.flip(-1)), self.score, targets)
                reward = y if self.variant == "preserve" else -y
                if not reward.requires_grad:
                    raise no_path("the images")
                apart = (masks.flatten(1).sort(dim=1, stable=True).values - wanted).square().mean(dim=1)
                energy = (reward.to(apart) - weight * apart).sum()
            gradient = gradient_of(energy, heights, "the images")
            heights.grad = -gradient
            optimizer.step()
            with torch.no_grad():
                heights.clamp_(0, 1)
            weight *= 1.0035
        return inner.detach()


def pyramid(images: Tensor) -> Tensor:
    """Images (B, C, H, W) under Gaussian blur, from the strongest to none, (B, LEVELS, C, H, W). Pixels of the border
    are repeated outwards."""
    made = []
    for level in range(LEVELS - 1):
        rows, columns = (_blur(side, BLUR * (1 - level / (LEVELS - 1)), images) for side in images.shape[-2:])
        with torch.autocast(images.device.type, enabled=False):
            made.append(rows @ images @ columns.T)
    return torch.stack([*made, images], dim=1)


def _blur(side: int, sigma: float, like: Tensor) -> Tensor:
    """The matrix (side, side) of a blur along one axis, with 4 σ on both sides."""
    reach = torch.arange(-math.ceil(4 * sigma), math.ceil(4 * sigma) + 1)
    kernel = torch.exp(-(reach.double() ** 2) / (2 * sigma**2))
    at = (torch.arange(side)[:, None] + reach).clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64).scatter_add_(1, at, (kernel / kernel.sum()).expand(side, -1))
    return matrix.to(like)


def blended(levels: Tensor, masks: Tensor) -> Tensor:
    """Each pixel from its level, m (L - 1) for a mask m in [0, 1], between two levels interpolated linearly.

    Args:
        levels: (B, L, C, H, W).
        masks: (B, H, W).

    Returns:
        (B, C, H, W).
    """
    last = levels.shape[1] - 1
    at = masks[:, None, None] * last
    lower = at.detach().floor().long()
    below, above = (
        levels.gather(1, some.expand(-1, -1, *levels.shape[2:])) for some in (lower, (lower + 1).clamp(max=last))
    )
    return (below + (at - lower) * (above - below))[:, 0]


class Bumps:
    """Masks that are the smooth maximum of bumps at the corners of cells, exp(-2 max(d / σ - 1/2, 0)²) at distance d.

    A pixel reads (2 r + 1)² bumps around it, r = 1 + ⌈σ / cell⌉. A mask has a margin of σ pixels around the image.

    Args:
        images: (B, C, H, W).
        cell: distance between bumps in pixels.
        sigma: σ in pixels.
    """

    def __init__(self, images: Tensor, cell: int, sigma: int) -> None:
        height, width = images.shape[-2:]
        self.cell, self.margin = cell, sigma
        self.cells = (math.ceil(height / cell), math.ceil(width / cell))
        """Bumps along both sides."""
        self.padding, self.reach = 1 + math.ceil(2 * sigma / cell), 3 + 2 * math.ceil(sigma / cell)
        rows, columns = (n + 2 * self.padding - self.reach + 1 for n in self.cells)
        self.size = (rows * cell - cell + 1, columns * cell - cell + 1)
        """Pixels of a mask, with its margin."""
        self.inside = (slice(sigma, sigma + height), slice(sigma, sigma + width))
        # A pixel is at a phase of its cell, and distances to the bumps around it depend on the phase alone.
        apart = torch.arange(cell)[:, None] - sigma - cell * (torch.arange(self.reach) - self.padding)
        apart = apart.double().square()
        distances = (apart[:, None, :, None] + apart[None, :, None, :]).sqrt() / sigma
        kernel = torch.exp(-2 * (distances - 0.5).clamp(min=0) ** 2)
        wide = torch.promote_types(images.dtype, torch.float32)
        self.weight = kernel.flatten(2).flatten(0, 1).to(images.device, wide)
        """Bumps (phases, places) seen from each phase."""

    def masks(self, heights: Tensor) -> Tensor:
        """Masks (B, *size) of heights (B, *cells), differentiable."""
        padded = F.pad(heights, (self.padding,) * 4)
        made: Tensor = _SmoothMax.apply(padded, self.weight, self.reach)  # type: ignore[no-untyped-call]
        large = F.pixel_shuffle(made, self.cell)[:, 0]
        return large[:, : self.size[0], : self.size[1]]

    def cropped(self, masks: Tensor) -> Tensor:
        """Masks without their margin."""
        return masks[:, *self.inside]


class _SmoothMax(torch.autograd.Function):
    """Σ_k a_k e^(T a_k) / Σ_k e^(T a_k) over bumps k with a_k = weight · height, at all phases (B, phases, h, w).

    The bumps are added one by one, in both directions, because all of them together take 81 times the memory of a mask.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, reach: int) -> Tensor:
        size = (len(padded), len(weight), *(n - reach + 1 for n in padded.shape[-2:]))
        above, below = padded.new_zeros(size), padded.new_zeros(size)
        for _, a in _bumps(padded, weight, reach):
            e = (COLDNESS * a).exp_()
            below += e
            above += e.mul_(a)
        made = above / below
        ctx.save_for_backward(padded, weight, made, below)
        ctx.reach = reach
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        padded, weight, made, below = ctx.saved_tensors
        scaled, total = gradients[0] / below, torch.zeros_like(padded)
        for (k, window), (_, a) in zip(_windows(total, ctx.reach), _bumps(padded, weight, ctx.reach), strict=True):
            slope = (COLDNESS * a).exp_().mul_((a - made).mul_(COLDNESS).add_(1)).mul_(scaled)
            window += torch.einsum("bphw,p->bhw", slope, weight[:, k])
        return total, None, None


def _windows(padded: Tensor, reach: int) -> Iterator[tuple[int, Tensor]]:
    """The heights of bump k around every cell, (B, h, w)."""
    height, width = (n - reach + 1 for n in padded.shape[-2:])
    for k in range(reach**2):
        y, x = divmod(k, reach)
        yield k, padded[:, y : y + height, x : x + width]


def _bumps(padded: Tensor, weight: Tensor, reach: int) -> Iterator[tuple[int, Tensor]]:
    for k, window in _windows(padded, reach):
        yield k, weight[:, k, None, None] * window[:, None]
