"""The base of faithfulness metrics: per image inside, reduced over ranks; and their protocols."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from interp_models.core.errors import InputError, unknown
from interp_models.core.inputs import check_clean, check_images, check_unit, pixel_range
from interp_models.core.registry import Registry
from interp_models.core.scoring import ScoreFn, checked, checked_images, full_float32, per_image
from interp_models.metrics import perturbation

Grid = tuple[int, int]
WRAP = "0 is black; wrap a model that wants others: nn.Sequential(Normalize(mean, std), model)"


@dataclass(frozen=True)
class Preset:
    """A protocol: what the sources leave open or do differently."""

    mask: Callable[[Tensor, tuple[int, int]], Tensor]
    """Map (B, h, w) and image size -> soft mask (B, H, W)."""
    blur: Callable[[Tensor], Tensor]
    """Start image of insertion."""
    blur_name: str
    """Its name in result rows."""
    counts: Callable[[int, int], list[int]]
    """Cells and most steps -> cells removed at each point of a curve."""
    divide_by_max: bool
    """The areas under curves are of scores divided by the curve's maximum."""
    clip_add: bool
    """ADD counts drops alone, like AD."""


def _upsample_then_normalise(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return perturbation.min_max(F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0])


def _normalise_then_upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    normalised = perturbation.min_max(maps)[:, None]
    return F.interpolate(normalised, size=size, mode="bicubic", align_corners=False)[:, 0]


def _even_counts(cells: int, max_steps: int) -> list[int]:
    steps = min(cells, max_steps)
    return [round(step * cells / steps) for step in range(steps + 1)]


def _whole_counts(cells: int, max_steps: int) -> list[int]:
    per_step = cells // min(cells, max_steps)
    return [*range(0, cells, per_step), cells]


PRESETS: dict[str, Preset] = {
    # Gomez et al. 2023, section 3.1, equations 23 to 26. Our choices where it gives none: black is 0 in pixel space,
    # the blur is RISE's, ADD is clipped like AD, curves begin with the clean image (deletion) or the blurred one.
    "gomez2023": Preset(
        _upsample_then_normalise, perturbation.gaussian, "gaussian blur 11 px σ 5", _even_counts, True, True
    ),
    # The PyPI package saliency-maps-metrics 0.0.26, called one image at a time with targets given.
    "saliency-maps-metrics": Preset(
        _normalise_then_upsample, perturbation.box_blur, "box blur", _whole_counts, False, False
    ),
}


class Measure(Metric, ABC):
    """The base of registered metrics: named values, with their descriptions for tables."""

    is_differentiable = False
    full_state_update = False

    keys: ClassVar[tuple[str, ...]]
    """Names of the values, in the literature's spelling."""
    higher_is_better_by_key: ClassVar[dict[str, bool]]
    """Whether a higher value is better, by key."""
    percent: ClassVar[bool]
    """Whether tables show values as percent, or as decimals."""
    legend: ClassVar[dict[str, str]]
    """One sentence per key that explains it under a table."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Aliases of keys in the literature -> keys."""


class FaithfulnessMetric(Measure, ABC):
    """Scores maps by what happens to a class probability when the image is perturbed as they say.

    A value that is undefined by nature (of a constant map, of a score of 0, of a score that cannot rise) is NaN for
    its image, counted, and left out of the mean. States are per-image values, concatenated over ranks.

    Args:
        preset: protocol, one of `PRESETS`.
        grid: cells (rows, columns) that every map is brought to; None leaves maps on their own grid.
        max_steps: most steps of a curve.
        batch: images per pass; None chooses by the device.
    """

    def __init__(
        self,
        *,
        preset: str = "gomez2023",
        grid: Grid | None = None,
        max_steps: int = 196,
        batch: int | None = None,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        if max_steps < 1 or (batch is not None and batch < 1) or (grid is not None and min(grid) < 1):
            raise InputError(f"max_steps, batch and grid must be at least 1; got {max_steps}, {batch}, {grid}")
        self.preset = PRESETS[preset]
        self.grid, self.max_steps, self.batch = grid, max_steps, batch
        self._kept: Grid | None = None
        """The grid of maps whose values are kept."""
        self._seen: Grid | None = None
        """The grid of the last maps."""
        for key in self.keys:
            self.add_state(f"values_{key}", default=[], dist_reduce_fx="cat")

    def update(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor | int, clean: Tensor | None = None
    ) -> None:
        """Score a batch and keep its values; see `score`.

        Raises:
            InputError: as `score`, and without `grid` for maps of another grid than those before.
        """
        self._check_kept(maps)
        values = self.score(score_fn, images, maps, target, clean)
        self._kept = (maps.shape[1], maps.shape[2])
        self.add(values)

    def forward(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor | int, clean: Tensor | None = None
    ) -> Any:
        """`update`, and the means of this batch alone."""
        self._check_kept(maps)  # the batch alone knows nothing of those before
        return super().forward(score_fn, images, maps, target, clean)

    def score(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor | int, clean: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The value of every image (B,) by key, NaN where it is undefined; keeps nothing.

        Without `grid`, maps that have a cell for each pixel, and maps of another grid than those before, are scored
        with a warning: the number of cells is that of the steps, so their values do not compare with those of other
        grids.

        Args:
            score_fn: images (B, 3, H, W) -> class probabilities (B, K), as from `scoring.probabilities(model)`.
            images: (B, 3, H, W) in [0, 1]; 0 is black.
            maps: (B, h, w), larger is more important.
            target: class of each image (B,), or one class for all.
            clean: the target's probability of each image (B,), if it is known; saves a pass.

        Raises:
            InputError: for images that are no float tensor or not in [0, 1], maps of the wrong shape, with NaN or
                finer than the image, a class that does not exist, and a function that does not return probabilities.
        """
        check_images(images, "images")
        check_unit(pixel_range(images, "images"), WRAP, "images")
        perturbation.check_maps(images, maps)
        if self.grid is None:
            self._tell_grid((maps.shape[1], maps.shape[2]), (images.shape[2], images.shape[3]))
        with torch.no_grad(), full_float32(), checked_images():
            own = maps.to(images.device).float()
            maps = perturbation.to_grid(own, self.grid)
            perturbation.check_grid(images, maps)
            target = per_image(target, len(images)).to(images.device)
            score_fn = checked(score_fn)
            if clean is None:
                clean = perturbation.score_all(score_fn, images, target, self.batch)
            check_clean(clean, len(images))
            values = self._score(score_fn, images, maps, target, clean)
        # Also of the map as given: what resampling makes of a constant is rounding noise, which looks like a map
        constant = perturbation.is_constant(own) | perturbation.is_constant(maps)
        return {
            key: torch.where(constant, torch.nan, value.float().to(constant.device)) for key, value in values.items()
        }

    def _check_kept(self, maps: Tensor) -> None:
        """Raise `InputError` where the values of these maps would be averaged with those of another grid."""
        own = tuple(getattr(maps, "shape", ())[1:])
        if self.grid is None and self._kept is not None and len(own) == 2 and own != self._kept:
            raise InputError(
                f"maps are of the grid {own}, those before of {self._kept}: values on different grids do not compare; "
                f"give the metric one for all, such as grid={self._kept}"
            )

    def _tell_grid(self, own: Grid, size: Grid) -> None:
        """Warn of maps whose values do not compare with others'."""
        seen, self._seen = self._seen, own
        if seen not in (None, own):
            why = f"those before were of {seen}"
        elif own == size:
            why = "a cell for each pixel; a map that was enlarged has lost its own grid"
        else:
            return
        warnings.warn(
            f"maps are of the grid {own}, {why}: values on different grids do not compare; give the metric one for "
            "all, such as grid=(7, 7)",
            stacklevel=3,
        )

    def reset(self) -> None:
        """Forget all values."""
        super().reset()
        self._kept = self._seen = None

    @abstractmethod
    def _score(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor, clean: Tensor
    ) -> dict[str, Tensor]:
        """Compute `score` for maps on the grid. The values of constant maps are discarded."""

    def add(self, values: dict[str, Tensor]) -> None:
        """Keep values that `score` gave."""
        self._update_count += 1
        self._computed = None
        for key in self.keys:
            getattr(self, f"values_{key}").append(values[key])

    def compute(self) -> dict[str, Tensor]:
        """The mean of every key over the images where it is defined; NaN if it is defined nowhere."""
        return {key: self._values(key).nanmean() for key in self.keys}

    def per_image(self) -> dict[str, Tensor]:
        """Every value (n,) of all ranks by key, rank by rank; NaN where it is undefined."""
        with self.sync_context(should_sync=self._to_sync):
            return {key: self._values(key).clone() for key in self.keys}

    def _values(self, key: str) -> Tensor:
        values = getattr(self, f"values_{key}")
        return dim_zero_cat(values) if len(values) else torch.empty(0, device=self.device)

    @abstractmethod
    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The number of steps (None for a metric without) on a grid, and the name of the fill."""


class MetricRegistry(Registry[FaithfulnessMetric]):
    """Metrics are also found by the keys that they give, so that `METRICS.build("dauc")` is `deletion_insertion`."""

    def aliases(self) -> dict[str, str]:
        """The registered metric of every key, and of other names of keys."""
        return {
            key: name
            for name, cls in self._classes().items()
            for key in (*cls.keys, *cls.aliases)  # type: ignore[attr-defined]
        }


METRICS = MetricRegistry("metric", "interp_models.metrics.METRICS")


def owner_of(key: str) -> type[FaithfulnessMetric] | None:
    """The registered metric that gives a key, None if there is none."""
    return METRICS.get(key) if key in METRICS.aliases() else None


def metrics_of(keys: Iterable[str]) -> dict[str, str]:
    """The registered metric that gives each key, aliases resolved; an unknown key raises `InputError`.

    >>> metrics_of(["ai"])
    {'iic': 'masked_confidence'}
    """
    owners, keys = METRICS.aliases(), list(keys)
    for key in keys:
        if key not in owners:
            raise unknown("metric", key, owners)
    own = [METRICS.get(key).aliases.get(key, key) for key in keys]
    return {key: owners[key] for key in own}
