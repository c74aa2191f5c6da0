"""The base class of metrics of maps, their protocols and their registry."""

import fnmatch
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from interp_models.core.errors import InputError, NotApplicable, unknown
from interp_models.core.maps import enlarged
from interp_models.core.modes import full_float32
from interp_models.core.registry import C, Registry
from interp_models.core.scoring import ScoreFn, checked, checked_images
from interp_models.metrics import perturbation
from interp_models.metrics.case import WORDS, Case, as_case, checked_case
from interp_models.metrics.presets import PRESETS

Grid = tuple[int, int]
Family = Literal["faithfulness", "localisation", "form"]


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


class MapMetric(Measure, ABC):
    """Abstract: a metric of saliency maps, with one value per image.

    It is a torchmetrics `Metric`: `update` scores a batch, `compute` gives means over all images and ranks. A subclass
    implements `_score` and `protocol`, and sets `keys` and the other class attributes of `Measure`.

    Some values are undefined: those of a constant map, of a score of 0, of an image without the ground truth that the
    metric needs. They are NaN, and left out of the mean.

    Args:
        preset: protocol, one of `PRESETS`.
        grid: rows and columns of cells that every map is resampled to; None keeps each map's own grid.
        max_steps: largest number of steps of a curve; None takes the preset's.
        batch: images per forward pass; None chooses it for the device.
        wanted: keys to compute, as others may take passes; None computes all.

    Raises:
        InputError: for an unknown preset or key, for numbers below 1, and for a class that lacks an attribute of
            `Measure` or an entry for one of its keys.
    """

    family: ClassVar[Family] = "faithfulness"
    """What the metric judges: `faithfulness` to the model, `localisation` of the ground truth, or the map's `form`."""
    needs: ClassVar[tuple[str, ...]] = ("score_fn",)
    """What the metric cannot do without: `score_fn`, `explain` or `correct` of a `Case`, or a field of its `Truth`."""

    width: ClassVar[tuple[int, ...]] = ()
    """Shape of what `score` returns for each image and key; () is one number. Others need `over_images`."""

    def __init__(
        self,
        *,
        preset: str = "gomez2023",
        grid: Grid | None = None,
        max_steps: int | None = None,
        batch: int | None = None,
        wanted: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.check_declared()
        asked = self.keys if wanted is None else wanted
        if unknown_keys := [key for key in asked if key not in self.keys]:
            raise unknown("key", unknown_keys[0], self.keys)
        self.wanted = tuple(key for key in self.keys if key in asked)
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        self.preset = PRESETS[preset]
        steps = self.preset.max_steps if max_steps is None else max_steps
        for option, value in (("max_steps", steps), ("batch", batch), ("grid", None if grid is None else min(grid))):
            if value is not None and value < 1:
                raise InputError(f"{option} must be at least 1; got {grid if option == 'grid' else value}")
        self.grid, self.max_steps, self.batch = grid, steps, batch
        self.size: Grid | None = None
        """Height and width of the images, on which the steps of a preset by pixels depend; None before the first."""
        self._kept: Grid | None = None
        """Grid of the maps whose values were kept."""
        self._seen: Grid | None = None
        """Grid of the maps that were scored last."""
        for key in self.wanted:
            self.add_state(f"values_{key}", default=[], dist_reduce_fx="cat")

    @classmethod
    def check_declared(cls) -> None:
        """Also raise `InputError` if `needs` names what no case can have, or if `_score` does not take a case alone."""
        super().check_declared()
        if len(inspect.signature(cls._score).parameters) != 2:
            raise InputError(f"metric {cls.__name__}: _score takes one argument, the Case (docs/adding-a-metric.md)")
        if wrong := [need for need in cls.needs if need not in WORDS]:
            raise InputError(f"metric {cls.__name__} needs {wrong[0]!r}; a case can have {', '.join(WORDS)}")

    def update(
        self,
        case: Case | ScoreFn,
        images: Tensor | None = None,
        maps: Tensor | None = None,
        target: Tensor | int = 0,
        clean: Tensor | None = None,
    ) -> None:
        """Score a batch and keep its values. See `score` for the arguments.

        Raises:
            InputError: as `score`; without `grid`, also if maps have another grid than earlier ones.
        """
        own: Case = as_case(case, images, maps, target, clean)
        self._check_kept(own)
        values = self.score(own)
        self._kept = (own.maps.shape[1], own.maps.shape[2])
        self.add(values)

    def forward(
        self,
        case: Case | ScoreFn,
        images: Tensor | None = None,
        maps: Tensor | None = None,
        target: Tensor | int = 0,
        clean: Tensor | None = None,
    ) -> Any:
        """Do `update`, and return the means over this batch only."""
        own: Case = as_case(case, images, maps, target, clean)
        self._check_kept(own)  # torchmetrics resets the state before it calls `update`
        return super().forward(own)

    def score(
        self,
        case: Case | ScoreFn,
        images: Tensor | None = None,
        maps: Tensor | None = None,
        target: Tensor | int = 0,
        clean: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Score a batch without keeping the values.

        The number of steps depends on the grid, so values on different grids are not comparable. Without `grid`, a
        warning says so for maps with one cell per pixel, and for maps with another grid than earlier ones.

        Args:
            case: images, maps, and what else the metric needs. A score function with the other arguments is short for
                `Case(images, maps, target, score_fn, clean)`.
            images: (B, 3, H, W), only in the short form; the others too.
            maps: (B, h, w).
            target: class of each image (B,), or one class for all.
            clean: probability of the target for each image (B,), if it is known.

        Returns:
            For each wanted key the value of every image (B,), NaN where it is undefined. If the values of an image
            depend on other images, it is (B, *width), which `over_images` turns into values.

        Raises:
            NotApplicable: if the case lacks what the metric needs.
            InputError: as `checked_case`, if maps are finer than the images, if a class does not exist, if the function
                does not return probabilities, or if the subclass's values are not finite or NaN values (B,) of its
                keys.
        """
        case = checked_case(as_case(case, images, maps, target, clean))
        self.check_needs(case)
        images, own, self.size = case.images, case.maps, case.size
        if self.grid is None:
            self._tell_grid((own.shape[1], own.shape[2]), case.size)
        with torch.no_grad(), full_float32(), checked_images():
            maps = perturbation.to_grid(own, self.grid)
            perturbation.check_grid(images, maps)
            case = replace(case, maps=maps)
            if case.score_fn is not None and "score_fn" in self.needs:
                case = replace(case, score_fn=checked(case.score_fn))
                if case.clean is None:
                    case = replace(case, clean=case.scores(images, self.batch))
            with case.watched(*self.keys) if self.perturbs() else nullcontext():
                values = self._score(case)
        self._check_form(values, len(images))
        # Check the original map, too: resampling turns a constant map into rounding noise, which looks like a map.
        constant = perturbation.is_constant(own) | perturbation.is_constant(maps)
        found = {}
        for key in self.wanted:
            value = values[key].float().to(constant.device)
            found[key] = value.masked_fill(constant.view(-1, *[1] * (value.dim() - 1)), torch.nan)
            if bool(found[key].isinf().any()):
                raise InputError(f"metric {type(self).__name__}: {key} is infinite for an image; undefined is NaN")
        return found

    @classmethod
    def perturbs(cls) -> bool:
        """Whether the metric passes perturbed images itself, whose distance from clean ones counts."""
        return bool({"score_fn", "logit_fn"} & set(cls.needs))

    @classmethod
    def check_needs(cls, case: Case) -> None:
        """Raise `NotApplicable` if a case lacks what the metric needs."""
        if reason := case.lacks(cls.needs):
            raise NotApplicable(reason)

    def _check_form(self, values: object, batch: int) -> None:
        """Raise `InputError` unless a subclass returned a value per image for the wanted keys, and for no others than
        its keys."""
        name = type(self).__name__
        if not isinstance(values, Mapping) or not set(self.wanted) <= set(values) <= set(self.keys):
            found = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise InputError(
                f"metric {name} must return a dict with exactly the keys {', '.join(self.wanted)}; got {found}"
            )
        for key, value in values.items():
            if not isinstance(value, Tensor) or value.shape != (batch, *self.width):
                found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                what = "one value per image" if not self.width else "values per image"
                raise InputError(
                    f"metric {name}: {key} must be a tensor of {what}, {(batch, *self.width)}; got {found}"
                )

    def _check_kept(self, case: Case) -> None:
        """Raise `InputError` if the values of these maps would be averaged with those of another grid."""
        own = tuple(getattr(getattr(case, "maps", None), "shape", ())[1:])
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
        elif own == size and not self.preset.pixels:  # by pixels, it is what a map is brought to
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
    def _score(self, case: Case) -> dict[str, Tensor]:
        """Return what `score` returns, for a checked case with maps on the grid. If the metric needs scores, `clean` is
        known. Values of constant maps and of keys that are not wanted are discarded, so they need no care here."""

    @classmethod
    def over_images(cls, key: str, values: Tensor) -> Tensor:
        """The values (N,) of all images, from what `score` returned for them.

        A metric overrides it if a value depends on other images, such as on a threshold that is chosen for all.

        Args:
            key: one of `keys`.
            values: (N, *width), of the images of all batches and ranks.
        """
        return values

    def undefined(self, images: Tensor) -> dict[str, Tensor]:
        """What `score` returns if no value is defined."""
        return {key: images.new_full((len(images), *self.width), torch.nan, dtype=torch.float32) for key in self.wanted}

    def ordered(self, case: Case) -> Tensor:
        """The maps (B, h, w) in whose order curves remove: on their grid, or upsampled to the images by the preset."""
        if not self.preset.pixels:
            return case.maps
        return enlarged(case.maps, case.size)

    def steps(self, grid: Grid) -> int:
        """Number of steps of a curve of a map with this grid."""
        rows, columns = (self.size or (self.max_steps, 1)) if self.preset.pixels else grid
        return len(self.preset.counts(rows * columns, self.max_steps)) - 1

    def wants(self, *keys: str) -> bool:
        """Whether at least one of these keys is wanted."""
        return any(key in self.wanted for key in keys)

    def add(self, values: dict[str, Tensor]) -> None:
        """Keep values that `score` returned."""
        self._update_count += 1
        self._computed = None
        for key in self.wanted:
            getattr(self, f"values_{key}").append(values[key].flatten())  # a rank without images has an empty row

    def compute(self) -> dict[str, Tensor]:
        """For each key the mean over all images with a defined value; NaN if there is none."""
        return {key: self._values(key).nanmean() for key in self.wanted}

    def per_image(self) -> dict[str, Tensor]:
        """For each key the values (n,) of all images, rank by rank; NaN where they are undefined."""
        with self.sync_context(should_sync=self._to_sync):
            return {key: self._values(key).clone() for key in self.wanted}

    def _values(self, key: str) -> Tensor:
        values = getattr(self, f"values_{key}")
        if not len(values):
            return torch.empty(0, device=self.device)
        return self.over_images(key, dim_zero_cat(values).view(-1, *self.width))

    @abstractmethod
    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """The protocol in words, for result rows.

        Args:
            key: one of `keys`.
            grid: rows and columns of the maps.

        Returns:
            The number of steps (None for a metric without steps), and the name of the fill of removed cells.
        """


class UnchangedImages(MapMetric, ABC):
    """Abstract: a metric that reads maps and ground truth, and changes no image."""

    needs: ClassVar[tuple[str, ...]] = ()

    def protocol(self, key: str, grid: Grid) -> tuple[int | None, str]:
        """No steps; no pixel is changed."""
        return None, "none"


class MetricRegistry(Registry[MapMetric]):
    """The registry of metrics of maps. Their keys are names, too: `METRICS.build("dauc")` builds
    `deletion_insertion`."""

    def register(self, name: str) -> Callable[[C], C]:
        """As `Registry.register`; it refuses a class that `Measure.check_declared` refuses, where it is defined."""
        enter = super().register(name)

        def checked_class(cls: C) -> C:
            cls.check_declared()  # type: ignore[attr-defined]  # every registered class is a MapMetric
            return enter(cls)

        return checked_class

    def aliases(self) -> dict[str, str]:
        """Every key, and every other name of a key, with the name of its registered metric.

        Raises:
            InputError: if two metrics have the same key, or one has the name of another's key, and for a class that
                `Measure.check_declared` refuses.
        """
        classes: dict[str, type[MapMetric]] = self._classes()
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


def owner_of(key: str) -> type[MapMetric] | None:
    """The registered metric class that gives a key; None if there is none."""
    return METRICS.get(key) if key in METRICS.aliases() else None


def metrics_of(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to the name of its registered metric. Aliases are resolved, patterns are replaced by all keys that
    match, and the name of a metric by all of its keys; an unknown key and a pattern without a match raise `InputError`.

    >>> metrics_of(["ai", "box_acc*"])
    {'iic': 'masked_confidence', 'box_accuracy': 'box_accuracy', 'box_accuracy_v2': 'box_accuracy'}
    """
    owners, every = METRICS.aliases(), [key for name in METRICS for key in METRICS.get(name).keys]
    keys = [match for key in keys for match in (fnmatch.filter(every, key) if "*" in key else [key]) or [key]]
    named = [key for key in METRICS.names() if key not in owners]
    keys = [each for key in keys for each in (METRICS.get(key).keys if key in named else [key])]
    for key in keys:
        if key not in owners:
            raise unknown("metric", key, owners)
    own = [METRICS.get(key).aliases.get(key, key) for key in keys]
    return {key: owners[key] for key in own}
