"""The base class of faithfulness metrics, their protocols and their registry."""

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
from interp_models.core.modes import full_float32
from interp_models.core.registry import Registry
from interp_models.core.scoring import ScoreFn, checked, checked_images, per_image
from interp_models.metrics import perturbation

Grid = tuple[int, int]
WRAP = (
    "0 is black; leave Normalize out of your transform, and put it before the model: nn.Sequential(Normalize(mean, "
    "std), model), or normalize=(mean, std)"
)
"""Ending of the message about images outside [0, 1]."""


@dataclass(frozen=True)
class Preset:
    """A protocol of the metrics: choices that publications make differently, or do not state.

    `PRESETS` lists them. `gomez2023` is the protocol of the tutorial. `saliency-maps-metrics` gives the values of the
    PyPI package of this name.
    """

    mask: Callable[[Tensor, tuple[int, int]], Tensor]
    """Function of maps (B, h, w) and the image size: soft masks (B, H, W)."""
    blur: Callable[[Tensor], Tensor]
    """Function of images: the blurred images that insertion starts from."""
    blur_name: str
    """Name of the blur in result rows."""
    counts: Callable[[int, int], list[int]]
    """Function of the number of cells and the most steps: number of removed cells at each point of a curve."""
    divide_by_max: bool
    """Whether scores are divided by the curve's maximum before the area under it is computed."""
    clip_add: bool
    """Whether ADD counts only drops, like AD; otherwise a rise counts as a negative drop."""


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
    # Gomez et al. 2023, section 3.1, equations 23 to 26. Where it states nothing we chose: black is 0 in pixel space,
    # the blur is that of RISE, ADD is clipped like AD, and curves include the clean (deletion) or blurred start image.
    "gomez2023": Preset(
        _upsample_then_normalise, perturbation.gaussian, "gaussian blur 11 px σ 5", _even_counts, True, True
    ),
    # Reproduces the PyPI package saliency-maps-metrics 0.0.26, called one image at a time with given targets.
    "saliency-maps-metrics": Preset(
        _normalise_then_upsample, perturbation.box_blur, "box blur", _whole_counts, False, False
    ),
}


class Measure(Metric, ABC):
    """Abstract: the base of all registered metrics. A metric gives one or several named values, its keys."""

    is_differentiable = False
    full_state_update = False

    keys: ClassVar[tuple[str, ...]]
    """Names of the values, as in the literature, in lower case."""
    higher_is_better_by_key: ClassVar[dict[str, bool]]
    """For each key, whether a higher value is better."""
    percent: ClassVar[bool]
    """Whether tables show values in percent; otherwise as decimals."""
    legend: ClassVar[dict[str, str]]
    """For each key, one sentence that explains it under a table."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of keys in the literature, each with its key."""

    @classmethod
    def check_declared(cls) -> None:
        """Raise `InputError` unless the class has all attributes above, with an entry for each key."""
        for attribute in ("keys", "higher_is_better_by_key", "percent", "legend"):
            if not hasattr(cls, attribute):
                raise InputError(f"metric {cls.__name__} must set {attribute}")
        if not cls.keys or not isinstance(cls.keys, tuple):  # ("dauc") is no tuple
            raise InputError(f"metric {cls.__name__}: keys must be a tuple of names; got {cls.keys!r}")
        for key in cls.keys:
            for attribute in ("higher_is_better_by_key", "legend"):
                if key not in getattr(cls, attribute):
                    raise InputError(f"metric {cls.__name__}: {attribute} has no entry for the key {key!r}")
        for alias, key in cls.aliases.items():
            if key not in cls.keys:
                raise InputError(f"metric {cls.__name__}: the alias {alias!r} stands for {key!r}, which is not a key")


class FaithfulnessMetric(Measure, ABC):
    """Abstract: judges saliency maps by the change of a class probability when the regions they mark are perturbed.

    It is a torchmetrics `Metric`: `update` scores a batch, `compute` gives means over all images and ranks. A subclass
    implements `_score` and `protocol`, and sets `keys` and the other class attributes of `Measure`.

    Some values are undefined: those of a constant map, of a score of 0, or of a score that cannot rise. They are NaN,
    and left out of the mean.

    Args:
        preset: protocol, one of `PRESETS`.
        grid: rows and columns of cells that every map is resampled to; None keeps each map's own grid.
        max_steps: largest number of steps of a curve.
        batch: images per forward pass; None chooses it for the device.

    Raises:
        InputError: for an unknown preset, for numbers below 1, and for a class that lacks an attribute of `Measure` or
            an entry for one of its keys.
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
        self.check_declared()
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        if max_steps < 1 or (batch is not None and batch < 1) or (grid is not None and min(grid) < 1):
            raise InputError(f"max_steps, batch and grid must be at least 1; got {max_steps}, {batch}, {grid}")
        self.preset = PRESETS[preset]
        self.grid, self.max_steps, self.batch = grid, max_steps, batch
        self._kept: Grid | None = None
        """Grid of the maps whose values were kept."""
        self._seen: Grid | None = None
        """Grid of the maps that were scored last."""
        for key in self.keys:
            self.add_state(f"values_{key}", default=[], dist_reduce_fx="cat")

    def update(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor | int, clean: Tensor | None = None
    ) -> None:
        """Score a batch and keep its values. See `score` for the arguments.

        Raises:
            InputError: as `score`; without `grid`, also if maps have another grid than earlier ones.
        """
        self._check_kept(maps)
        values = self.score(score_fn, images, maps, target, clean)
        self._kept = (maps.shape[1], maps.shape[2])
        self.add(values)

    def forward(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor | int, clean: Tensor | None = None
    ) -> Any:
        """Do `update`, and return the means over this batch only."""
        self._check_kept(maps)  # torchmetrics resets the state before it calls `update`
        return super().forward(score_fn, images, maps, target, clean)

    def score(
        self, score_fn: ScoreFn, images: Tensor, maps: Tensor, target: Tensor | int, clean: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Score a batch without keeping the values.

        The number of steps depends on the grid, so values on different grids are not comparable. Without `grid`, a
        warning says so for maps with one cell per pixel, and for maps with another grid than earlier ones.

        Args:
            score_fn: images (B, 3, H, W) -> class probabilities (B, K), such as `probabilities(model)`.
            images: (B, 3, H, W) in [0, 1]; 0 is black.
            maps: (B, h, w), larger values mean more important.
            target: class of each image (B,), or one class for all.
            clean: probability of the target for each image (B,), if it is known; saves one pass.

        Returns:
            For each key the value of every image (B,), NaN where it is undefined.

        Raises:
            InputError: if images are not a float tensor in [0, 1], if maps have a wrong shape, contain NaN or are finer
                than the images, if a class does not exist, if the function does not return probabilities, or if the
                subclass's values are not finite or NaN values (B,) of exactly its keys.
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
        self._check_form(values, len(images))
        # Check the original map, too: resampling turns a constant map into rounding noise, which looks like a map.
        constant = perturbation.is_constant(own) | perturbation.is_constant(maps)
        found = {key: torch.where(constant, torch.nan, values[key].float().to(constant.device)) for key in self.keys}
        for key, value in found.items():
            if bool(value.isinf().any()):
                raise InputError(f"metric {type(self).__name__}: {key} is infinite for an image; undefined is NaN")
        return found

    def _check_form(self, values: object, batch: int) -> None:
        """Raise `InputError` unless a subclass returned a value per image for exactly its keys."""
        name = type(self).__name__
        if not isinstance(values, Mapping) or set(values) != set(self.keys):
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise InputError(
                f"metric {name} must return a dict with exactly the keys {', '.join(self.keys)}; got {found}"
            )
        for key, value in values.items():
            if not isinstance(value, Tensor) or value.shape != (batch,):
                found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InputError(
                    f"metric {name}: {key} must be a tensor of one value per image, ({batch},); got {found}"
                )

    def _check_kept(self, maps: Tensor) -> None:
        """Raise `InputError` if the values of these maps would be averaged with those of another grid."""
        own = tuple(getattr(maps, "shape", ())[1:])
        if self.grid is None and self._kept is not None and len(own) == 2 and own != self._kept:
            raise InputError(
                f"maps have the grid {own}, earlier ones {self._kept}: values on different grids are not comparable; "
                f"give the metric one grid for all, such as grid={self._kept}"
            )

    def _tell_grid(self, own: Grid, size: Grid) -> None:
        """Warn of maps whose values are not comparable with others'."""
        seen, self._seen = self._seen, own
        if seen not in (None, own):
            why = f"earlier ones {seen}"
        elif own == size:
            why = "one cell per pixel; an upsampled map has lost its own grid"
        else:
            return
        warnings.warn(
            f"maps have the grid {own}, {why}: values on different grids are not comparable; give the metric one grid "
            "for all, such as grid=(7, 7)",
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
        """Return what `score` returns, for checked arguments and maps on the grid. Values of constant maps are
        discarded, so they need no care here."""

    def add(self, values: dict[str, Tensor]) -> None:
        """Keep values that `score` returned."""
        self._update_count += 1
        self._computed = None
        for key in self.keys:
            getattr(self, f"values_{key}").append(values[key])

    def compute(self) -> dict[str, Tensor]:
        """For each key the mean over all images with a defined value; NaN if there is none."""
        return {key: self._values(key).nanmean() for key in self.keys}

    def per_image(self) -> dict[str, Tensor]:
        """For each key the values (n,) of all images, rank by rank; NaN where they are undefined."""
        with self.sync_context(should_sync=self._to_sync):
            return {key: self._values(key).clone() for key in self.keys}

    def _values(self, key: str) -> Tensor:
        values = getattr(self, f"values_{key}")
        return dim_zero_cat(values) if len(values) else torch.empty(0, device=self.device)

    @abstractmethod
    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The protocol in words, for result rows.

        Args:
            key: one of `keys`.
            grid: rows and columns of the maps.

        Returns:
            The number of steps (None for a metric without steps), and the name of the fill of removed cells.
        """


class MetricRegistry(Registry[FaithfulnessMetric]):
    """The registry of faithfulness metrics. Their keys are names, too: `METRICS.build("dauc")` builds
    `deletion_insertion`."""

    def aliases(self) -> dict[str, str]:
        """Every key, and every other name of a key, with the name of its registered metric.

        Raises:
            InputError: if two metrics have the same key, or one has the name of another's key, and for a class that
                `Measure.check_declared` refuses.
        """
        classes: dict[str, type[FaithfulnessMetric]] = self._classes()
        found: dict[str, str] = {}
        for name, cls in classes.items():
            cls.check_declared()
            for key in (*cls.keys, *cls.aliases):
                other = key if key in classes and key != name else found.get(key, name)
                if other != name:
                    raise InputError(f"metrics {other!r} and {name!r} both have the key or name {key!r}; rename one")
                found[key] = name
        return found


METRICS = MetricRegistry("metric", "interp_models.metrics.METRICS")


def owner_of(key: str) -> type[FaithfulnessMetric] | None:
    """The registered metric class that gives a key; None if there is none."""
    return METRICS.get(key) if key in METRICS.aliases() else None


def metrics_of(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to the name of its registered metric. Aliases are resolved; an unknown key raises `InputError`.

    >>> metrics_of(["ai"])
    {'iic': 'masked_confidence'}
    """
    owners, keys = METRICS.aliases(), list(keys)
    for key in keys:
        if key not in owners:
            raise unknown("metric", key, owners)
    own = [METRICS.get(key).aliases.get(key, key) for key in keys]
    return {key: owners[key] for key in own}
