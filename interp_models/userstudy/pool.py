"""The judged images of one or several models as tasks use them: pictures, maps, predictions, scores."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interp_models.core.batches import all_scores
from interp_models.core.errors import InputError, NotApplicable
from interp_models.core.modes import evaluating, full_float32
from interp_models.core.scoring import probabilities
from interp_models.data.module import DataModule
from interp_models.evaluation.comparison import Compared
from interp_models.evaluation.plan import Spec
from interp_models.evaluation.shown import sample_of
from interp_models.evaluation.wrong import SAME
from interp_models.explainers.base import EXPLAINERS, Explainer
from interp_models.explainers.controls import is_control
from interp_models.report import visual
from interp_models.report.visual import Picture

NO_MAP = "no map"
FIRST = 8
"""So many images are tried to see whether maps depend on the class; a map can be constant."""
SIDE = 280
"""Maximum side in pixels of a picture."""


@dataclass(frozen=True)
class Seen:
    """One image as one model sees it."""

    index: int
    image_id: str
    label: int
    """Its class; -1 if it is unknown or is none of the model's."""
    prediction: int
    confidence: float
    """Probability of the prediction."""
    explained: int
    """Class that the map explains."""

    @property
    def right(self) -> bool:
        return self.label == self.prediction


class Pool:
    """The judged images of models, with the maps of all explainers.

    Args:
        compared: the judged models; if there are several, on the same images.
        models: the models themselves.
        data: their images.
        specs: the explainers.
        knows_labels: for each model whether labels have a meaning for it.
    """

    def __init__(
        self,
        compared: Sequence[Compared],
        models: Sequence[nn.Module],
        data: Sequence[DataModule],
        specs: Sequence[Spec],
        knows_labels: Sequence[bool],
    ) -> None:
        self.runs = [one.summary.name for one in compared]
        self._compared = dict(zip(self.runs, compared, strict=True))
        self._models = dict(zip(self.runs, models, strict=True))
        self._data = {run: one.dataset("test") for run, one in zip(self.runs, data, strict=True)}
        self._class_names = {
            run: dict(enumerate(readable(own.classes) if known else ()))
            for run, own, known in zip(self.runs, data, knows_labels, strict=True)
        }
        self._specs = {label: (name, options) for label, name, options in specs}
        self._explainers: dict[str, Explainer] = {}
        self._pictures: dict[tuple[int, str], Picture] = {}
        self._overlays: dict[tuple[int, str], Picture] = {}
        self._scores: dict[tuple[int, str], NDArray[np.float64]] = {}
        self._seen = {
            run: _seen(one, known) for (run, one), known in zip(self._compared.items(), knows_labels, strict=True)
        }
        self.indices = list(self._seen[self.runs[0]])
        """Indices of the images, in the order of the tables."""

    def sources(self, *, no_map: bool = False, of_class: bool = False) -> list[str]:
        """Names of what a condition can show: an explainer or, for several models, MODEL/EXPLAINER.

        Args:
            no_map: whether the name of showing no map comes first.
            of_class: leave out explainers whose maps do not depend on the class.

        Raises:
            InputError: if there is none.
        """
        found = [NO_MAP if len(self.runs) == 1 else f"{run}/{NO_MAP}" for run in self.runs] if no_map else []
        own = [
            self._name(run, explainer)
            for run, one in self._compared.items()
            for explainer in one.tables.maps
            if not of_class or self._depends_on_class(run, explainer)
        ]
        if not own:
            raise InputError("userstudy: no explainer gives maps that depend on the class; list one, such as gradcam")
        return found + own

    def _name(self, run: str, explainer: str) -> str:
        return explainer if len(self.runs) == 1 else f"{run}/{explainer}"

    def parts(self, source: str) -> tuple[str, str | None]:
        """The run and the explainer of a source; the explainer is None if no map is shown."""
        run, explainer = (self.runs[0], source) if len(self.runs) == 1 else source.rsplit("/", 1)
        return run, None if explainer == NO_MAP else explainer

    def seen(self, index: int, source: str | None = None) -> Seen:
        """An image as the model of a source sees it; None takes the first model."""
        return self._seen[self.runs[0] if source is None else self.parts(source)[0]][index]

    def class_name(self, label: int, source: str | None = None) -> str:
        """Name of a class of the model of a source, as people read it (`readable`); None takes the first model."""
        run = self.runs[0] if source is None else self.parts(source)[0]
        return self._class_names[run].get(label) or self._compared[run].class_name(label)

    def picture(self, index: int, source: str) -> Picture:
        """An image as a model sees it."""
        run, _ = self.parts(source)
        if (index, run) not in self._pictures:
            self._pictures[index, run] = visual.to_uint8(self.image(index, source))
        return visual.shrunk(self._pictures[index, run], SIDE)

    def overlay(self, index: int, source: str) -> Picture:
        """A map over its image."""
        run, explainer = self.parts(source)
        assert explainer is not None
        if (index, source) not in self._overlays:
            tables = self._compared[run].tables
            row = int(tables.listing.loc[tables.listing["index"] == index, "row"].iloc[0])
            self._overlays[index, source] = self.drawn(index, source, np.asarray(tables.maps[explainer][row]))
        return self._overlays[index, source]

    def drawn(self, index: int, source: str, map: NDArray[np.floating]) -> Picture:
        """A given map over an image."""
        return visual.drawn(self.picture(index, source), map)[0]

    def image(self, index: int, source: str) -> Tensor:
        """An image (3, H, W) in [0, 1]."""
        return sample_of(self._data[self.parts(source)[0]], index).image

    def clean_scores(self, index: int, source: str) -> NDArray[np.float64]:
        """The probabilities of all classes (K,) that the model of a source gives an image."""
        key = index, self.parts(source)[0]
        if key not in self._scores:
            self._scores[key] = self.scores(self.image(index, source)[None], source)[0]
        return self._scores[key]

    def scores(self, images: Tensor, source: str) -> NDArray[np.float64]:
        """The probabilities of all classes (N, K) that the model of a source gives images (N, 3, H, W)."""
        model = self._models[self.parts(source)[0]]
        with torch.no_grad(), evaluating(model), full_float32():
            found: NDArray[np.float64] = all_scores(probabilities(model), images.to(_device(model)), None).cpu().numpy()
        return found

    def class_maps(self, index: int, source: str, classes: Sequence[int]) -> NDArray[np.float32]:
        """The maps of classes (k, h, w) for one image, computed anew."""
        run, explainer = self.parts(source)
        assert explainer is not None
        if source not in self._explainers:
            name, options = self._specs[explainer]
            self._explainers[source] = EXPLAINERS.build(name, options, model=self._models[run])
        images = self.image(index, source).to(_device(self._models[run])).expand(len(classes), -1, -1, -1)
        maps = self._explainers[source].attribute(images.contiguous(), torch.tensor(classes, device=images.device))
        found: NDArray[np.float32] = maps.cpu().numpy()
        return found

    def _depends_on_class(self, run: str, explainer: str) -> bool:
        """Whether the maps of two classes differ: for the first image whose maps are not all constant."""
        name, _ = self._specs[explainer]
        if not EXPLAINERS.get(name).uses_class:
            return False
        for index in self.indices[:FIRST]:
            seen = self._seen[run][index]
            try:
                maps = self.class_maps(index, self._name(run, explainer), [seen.prediction, int(seen.prediction == 0)])
            except NotApplicable:
                return False
            if np.ptp(maps, axis=(1, 2)).any():
                return bool(np.abs(maps[0] - maps[1]).max() > SAME * max(np.abs(maps).max(), 1e-30))
        return False

    def values(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """The values of all metrics by source, key of the metric and index of the image."""
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for run, one in self._compared.items():
            first = one.tables.per_image.drop_duplicates(["explainer", "metric", "index"])
            for (explainer, key), own in first.groupby(["explainer", "metric"], sort=False):
                pairs = zip(own["index"], own["value"], strict=True)
                cells = {str(index): None if np.isnan(value) else float(value) for index, value in pairs}
                found.setdefault(self._name(run, str(explainer)), {})[str(key)] = cells
        return found

    def directions(self) -> dict[str, bool]:
        """Whether larger values are better, by key of the metric."""
        return {row["metric"]: row["higher_is_better"] for one in self._compared.values() for row in one.tables.rows}

    def controls(self) -> list[str]:
        """The sources that are controls."""
        return [name for name in self.sources() if is_control(self._specs[str(self.parts(name)[1])][0])]

    def reference(self) -> str | None:
        """The explainer that the others are compared with, of the first model."""
        run = self.runs[0]
        differences = self._compared[run].tables.differences
        return self._name(run, differences[0]["reference"]) if differences else None


def readable(names: Sequence[str]) -> list[str]:
    """Names of classes without a leading number and underscores; as they are, if two would become the same.

    >>> readable(["001.Black_footed_Albatross", "002.Laysan_Albatross"])
    ['Black footed Albatross', 'Laysan Albatross']
    """
    found = [re.sub(r"^\d+[._\s]+", "", name).replace("_", " ") or name for name in names]
    return found if len(set(found)) == len(found) else list(names)


def _seen(one: Compared, knows_labels: bool) -> dict[int, Seen]:
    """The images of a model by index."""
    tables = one.tables
    ids = dict(zip(tables.listing["index"].tolist(), tables.listing["image_id"].tolist(), strict=True))
    found = {}
    for row in tables.per_image.drop_duplicates("index").to_dict("records"):
        index, label = int(row["index"]), int(row["label"]) if knows_labels and "label" in row else -1
        found[index] = Seen(
            index, str(ids[index]), label, int(row["prediction"]), float(row["confidence"]), int(row["target_class"])
        )
    return found


def _device(model: nn.Module) -> Any:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
