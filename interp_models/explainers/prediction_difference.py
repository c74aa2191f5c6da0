"""Prediction difference analysis: the evidence for the class that a patch adds to the rest of the image."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interp_models.core.batches import scores_of_variants
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.rng import uniform
from interp_models.core.scoring import Target
from interp_models.explainers.base import EXPLAINERS, Explainer

Array = NDArray[Any]


@EXPLAINERS.register("prediction_difference")
class PredictionDifference(Explainer):
    """Prediction difference: log2 odds(c | x) - log2 odds(c | x without w), averaged over all windows w that cover a
    pixel (Zintgraf et al., ICLR 2017, equations 1 to 3 and algorithm 1).

    p(c | x without w) is the mean probability of class c over images whose window w is filled with a sample. odds are
    p / (1 - p) after the Laplace correction p ← (p N + 1) / (N + K) for N training images and K classes. Windows start
    every `stride` pixels, and the last ones end at the border. The paper samples from other images. An explainer has
    only x, so it treats all patches of x as samples of one distribution:

    - `conditional` draws, per colour channel, from the Gaussian of patches of window + 2 padding pixels, given the
      pixels around the window; values are cut off at the channel's smallest and largest. At the border the window lies
      off the centre of its patch.
    - `marginal` copies a window from a random place.

    Draws depend on the seed and the window, so the result does not depend on the batch. Each sample takes one forward
    pass. The map has the resolution of the input.

    Args:
        model: any module that returns logits.
        window: side of a window in pixels (paper: 10).
        stride: distance between windows in pixels, at most `window` (paper: 1).
        samples: samples per window.
        sampling: `conditional` or `marginal`.
        padding: pixels around a window on which its sample depends.
        instances: N of the Laplace correction.
        seed: seed of the samples.
        batch: images per forward pass; None chooses it for the device.

    Raises:
        NotApplicable: if the window with its padding does not fit into the image.
    """

    passes = "windows * samples + 1"
    amplifies_rounding = True
    stands_bfloat16 = False
    small: ClassVar[Mapping[str, Any]] = {"window": 32, "stride": 32, "samples": 2, "sampling": "marginal"}

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int = 16,
        stride: int = 8,
        samples: int = 10,
        sampling: Literal["conditional", "marginal"] = "conditional",
        padding: int = 2,
        instances: int = 100_000,
        seed: int = 0,
        batch: int | None = None,
    ) -> None:
        super().__init__(model, score="probability")
        if not 1 <= stride <= window or samples < 1 or instances < 1 or (batch is not None and batch < 1):
            raise InputError(
                "prediction_difference needs 1 <= stride <= window and samples, instances, batch >= 1; got stride "
                f"{stride}, window {window}, samples {samples}, instances {instances}, batch {batch}"
            )
        if padding < 1:
            raise InputError(f"prediction_difference: padding must be at least 1; got {padding}")
        self.window, self.stride, self.samples, self.sampling = window, stride, samples, sampling
        self.padding, self.instances, self.seed, self.batch = padding, instances, seed, batch

    @torch.no_grad()
    def _attribute(self, inputs: Tensor, target: Target) -> Tensor:
        conditional = self.sampling == "conditional"
        size = self.window + 2 * self.padding * conditional
        if size > min(inputs.shape[-2:]) or self.window == max(inputs.shape[-2:]):
            raise NotApplicable(
                f"prediction_difference: images of {inputs.shape[-2]} × {inputs.shape[-1]} pixels are too small for "
                f"windows of {self.window}" + f" with a margin of {self.padding} on each side" * conditional
            )
        score, whole, targets = self.scored(inputs, target)
        rows, columns = (self._starts(n) for n in inputs.shape[-2:])
        pixels = inputs.cpu().double().numpy()
        # Images come one after the other, and a Gaussian is large.
        gaussian = lru_cache(1)(lambda i: Patches(pixels[i], size) if conditional else None)

        def filled(b: Tensor, n: Tensor) -> Tensor:
            made = inputs[b.expand(len(n))].clone()
            for one, image, number in zip(made, b.expand(len(n)).tolist(), n.tolist(), strict=True):
                row, column = divmod(number // self.samples, len(columns))
                top, left = rows[row], columns[column]
                sample = self._sample(pixels[image], gaussian(image), top, left, number)
                one[:, top : top + self.window, left : left + self.window] = torch.from_numpy(sample).to(one)
            return made

        count = len(rows) * len(columns) * self.samples
        scores = scores_of_variants(score, inputs, count, filled, targets, self.batch)
        without = scores.cpu().double().view(len(inputs), len(rows), len(columns), self.samples).mean(dim=3)
        present = whole.gather(1, targets[:, None])[:, :, None].cpu().double()
        evidence = self._log_odds(present, whole.shape[1]) - self._log_odds(without, whole.shape[1])
        up, across = (
            torch.tensor([[start <= pixel < start + self.window for pixel in range(n)] for start in starts]).double()
            for starts, n in zip((rows, columns), inputs.shape[-2:], strict=True)
        )
        maps = (up.T @ evidence @ across) / (up.sum(dim=0)[:, None] * across.sum(dim=0))
        return maps.to(inputs.device, torch.float32)

    def _starts(self, side: int) -> list[int]:
        """First pixels of the windows along one axis."""
        last = side - self.window
        return [*range(0, last, self.stride), last]

    def _log_odds(self, p: Tensor, classes: int) -> Tensor:
        p = (p * self.instances + 1) / (self.instances + classes)
        return (p / (1 - p)).log2()

    def _sample(self, image: Array, gaussian: "Patches | None", top: int, left: int, number: int) -> Array:
        """A sample (C, window, window)."""
        if gaussian is None:
            draws = uniform(self.seed, number, [0, 1])
            y, x = (int(u * (n - self.window + 1)) for u, n in zip(draws, image.shape[1:], strict=True))
            return image[:, y : y + self.window, x : x + self.window]
        draws = uniform(self.seed, number, np.arange(len(image) * self.window**2)).clip(min=2.0**-54)
        normal = torch.special.ndtri(torch.from_numpy(draws)).numpy().reshape(len(image), self.window, self.window)
        return gaussian.sample(top, left, normal)


class Patches:
    """The Gaussian of all patches of an image, per colour channel.

    Args:
        image: (C, H, W).
        size: side of a patch.
    """

    def __init__(self, image: Array, size: int) -> None:
        self.image, self.size = image, size
        every = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(1, 2))
        count, total, products = every[0, :, :, 0, 0].size, np.zeros(1), np.zeros(1)
        centre = image.mean(axis=(1, 2))[:, None, None]
        for row in range(every.shape[1]):  # all patches at once would take size² times the memory of the image
            some = every[:, row].reshape(len(image), -1, size**2) - centre
            total = total + some.sum(axis=1)
            products = products + some.transpose(0, 2, 1) @ some
        means = total / count
        self.means: Array = means + centre[:, 0]
        self.covariances: Array = products / count - means[:, :, None] * means[:, None]
        # Patches of an image may span fewer dimensions than a patch has pixels.
        self.covariances += np.eye(size**2) * (1e-6 * self.covariances.mean(axis=0).diagonal().mean() + 1e-12)
        self._known: dict[tuple[int, int, int], tuple[NDArray[np.bool_], Array, Array]] = {}

    def sample(self, top: int, left: int, normal: Array) -> Array:
        """A sample of the window at (top, left), (C, window, window), from standard normal numbers of that shape."""
        window = normal.shape[1]
        padding = (self.size - window) // 2
        y, x = (
            min(max(start - padding, 0), n - self.size)
            for start, n in zip((top, left), self.image.shape[1:], strict=True)
        )
        place = (top - y, left - x, window)
        if place not in self._known:
            self._known[place] = self._given(*place)
        inside, slopes, roots = self._known[place]
        patch = self.image[:, y : y + self.size, x : x + self.size].reshape(len(self.image), -1)
        apart = (patch - self.means)[:, ~inside, None]
        made = self.means[:, inside, None] + slopes @ apart + roots @ normal.reshape(len(normal), -1, 1)
        low, high = (limit(self.image, axis=(1, 2))[:, None, None] for limit in (np.min, np.max))
        cut: Array = made.reshape(normal.shape).clip(low, high)
        return cut

    def _given(self, top: int, left: int, window: int) -> tuple[NDArray[np.bool_], Array, Array]:
        """Which pixels of a patch are inside the window; the regression on the others, Σ12 Σ22⁻¹ (C, in, out); and a
        root of the covariance that is left (C, in, in)."""
        grid = np.zeros((self.size, self.size), dtype=bool)
        grid[top : top + window, left : left + window] = True
        inside = grid.ravel()
        own, mixed, others = (
            self.covariances[:, one][:, :, two]
            for one, two in ((inside, inside), (inside, ~inside), (~inside, ~inside))
        )
        slopes = np.linalg.solve(others, mixed.transpose(0, 2, 1)).transpose(0, 2, 1)
        root: Array = np.linalg.cholesky(own - slopes @ mixed.transpose(0, 2, 1))
        return inside, slopes, root
