"""How far perturbed images lie from clean ones in a network's feature space."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from interp_models.core.errors import NotApplicable
from interp_models.core.known import known_of, unchanging
from interp_models.core.passes import are_counted, uncounted
from interp_models.core.prepared import Fused, class_name
from interp_models.core.scoring import probabilities

DIRECTIONS = 64
"""Random directions of feature space along which distributions are compared."""
ROUNDING = 1e-10
"""Up to this share of their mean square, the variance of features may be float32 noise: they are taken for equal."""


class Watcher:
    """Sums over the features of the images that a network passes: what `distance` needs, and no more.

    The features are the input of the last linear layer or convolution, averaged over positions or tokens, as in FID.

    Args:
        model: the network.
        images: images that it takes, (B, C, H, W).

    Raises:
        NotApplicable: if there is no such layer.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        known = known_of(model)
        if "last layer" not in known:
            with uncounted():
                known["last layer"] = last_layer(model, images[:1])
        if known["last layer"] is None:
            raise NotApplicable(f"{class_name(model)} has no linear layer or convolution that takes one tensor")
        self._layer = model.get_submodule(known["last layer"])
        precision = torch.float32 if images.device.type == "mps" else torch.float64  # which it does not have
        self._none = torch.zeros(1 + 2 * DIRECTIONS, dtype=precision, device=images.device)
        self._open: list[Tensor] = []
        """Sums of the contexts that are open."""
        self._directions: Tensor | None = None
        self.sums: dict[str, Tensor] = {}
        """By name: number of images, and sums of their features and squared features along the directions,
        (1 + 2 · DIRECTIONS,)."""

    @contextmanager
    def into(self, names: Sequence[str]) -> Iterator[Tensor]:
        """Add the features of the passes inside the context to the sums of these names, and not to those of an outer
        context. Yields what is added at the end."""
        own = self._none.clone()
        self._open.append(own)
        handle = None if len(self._open) > 1 else self._layer.register_forward_pre_hook(_Hook(self))
        try:
            yield own
        finally:
            self._open.pop()
            if handle is not None:
                handle.remove()
            for name in names:
                self.sums[name] = self.sums.get(name, self._none) + own

    def see_again(self, own: Tensor) -> None:
        """Add what an earlier context yielded to the context that is open."""
        if self._open:
            self._open[-1] += own

    def see(self, features: Tensor) -> None:
        """Add the features of one pass, (b, C), (b, tokens, C) or (b, C, h, w)."""
        x = features.detach().float()
        if isinstance(self._layer, nn.Linear):
            x = x.reshape(len(x), -1, x.shape[-1]).mean(dim=1)
        else:
            x = x.flatten(2).mean(dim=2)
        if self._directions is None:
            drawn = torch.randn(x.shape[1], DIRECTIONS, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
            self._directions = (drawn / drawn.norm(dim=0)).to(x.device)
        along = (x @ self._directions).to(self._none.dtype)
        count = along.new_full((1,), len(along))
        self._open[-1] += torch.cat([count, along.sum(dim=0), along.square().sum(dim=0)])


class _Hook:
    """A forward pre-hook that shows a layer's input to a watcher."""

    changes_nothing = True

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self._thread = get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and are_counted() and get_ident() == self._thread:
            self.watcher.see(args[0])


def last_layer(model: nn.Module, image: Tensor) -> str | None:
    """The name of the last linear layer or convolution that a pass of an image (1, C, H, W) reaches with one input;
    None if there is none."""
    reached: list[str] = []
    with unchanging():
        known_of(model)  # of the model without hooks
        handles = [
            part.register_forward_pre_hook(
                lambda _, args, name=name: reached.append(name) if args and _is_batch(args[0]) else None
            )
            for name, part in model.named_modules()
            if isinstance(part, nn.Linear | nn.modules.conv._ConvNd | Fused)  # parts of TorchScript take no hooks
        ]
        try:
            probabilities(model)(image)
        finally:
            for handle in handles:
                handle.remove()
    return reached[-1] if reached else None


def _is_batch(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() >= 2 and len(x) == 1 and x.is_floating_point()


def distance(clean: Tensor, perturbed: Tensor) -> float | None:
    """The distance of perturbed images from clean ones in feature space: d² = mean_θ [(m' - m)² + (s' - s)²] /
    mean_θ s², where m and s are the mean and standard deviation of the features along a random direction θ, and m', s'
    those of perturbed images.

    This is the sliced Wasserstein distance of normal distributions, in units of the clean images' spread. 0: they are
    distributed like the clean images. 1: they are as far as the clean images are from their mean.

    Args:
        clean: sums of the clean images, as in `Watcher.sums`.
        perturbed: sums of the perturbed images.

    Returns:
        The distance, at least 0; None if it is undefined: for fewer than two clean images, if their features are equal,
        or if some of the perturbed images are not finite.
    """
    (m, s), (own_m, own_s) = _moments(clean), _moments(perturbed)
    spread = float(s.square().mean())
    if clean[0] < 2 or perturbed[0] < 1 or not spread > ROUNDING * float(m.square().mean()):
        return None
    found = math.sqrt(float(((own_m - m).square() + (own_s - s).square()).mean()) / spread)
    return found if math.isfinite(found) else None


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along each direction."""
    mean, square = sums[1:].view(2, DIRECTIONS) / sums[0]
    return mean, (square - mean.square()).clamp(min=0).sqrt()
