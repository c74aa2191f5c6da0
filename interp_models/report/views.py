"""Data of the report page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RunSummary:
    """One model.

    `accuracy` is that of the training's own test, a fraction of `n` images, or None if unknown; `accuracy_judged` that
    of the weights judged here, on the `n_judged` images whose maps were judged, or None without labels. `selection`
    says which weights these are: "best validation epoch", "last epoch", or "as given". `seed` is that of the training,
    None if it is not known.
    """

    name: str
    model: str
    dataset: str
    accuracy: float | None
    n: int
    accuracy_judged: float | None
    n_judged: int
    seed: int | None
    selection: str


@dataclass(frozen=True)
class MapView:
    """One explainer's map of one image, on its native grid (h, w), signed or not, with its scores as fractions.

    A score of None is undefined. A constant map and one with values that are not finite are shown with a remark.
    """

    run: str
    explainer: str
    heatmap: NDArray[np.floating]
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Panel:
    """The match of one prototype or part: a picture (H, W, 3) and a remark."""

    number: int
    picture: NDArray[np.uint8]
    remark: str
    kind: Literal["prototype", "part"] = "prototype"


@dataclass(frozen=True)
class ImageView:
    """One image (H, W, 3) with what each run made of it.

    `predictions` holds, by run, the predicted label and its probability; it counts as right if it equals `label`.
    `parts` holds, by run, two or three of a model's own maps (n, h, w), which make one picture in red, green and blue.
    """

    image: NDArray[np.uint8]
    image_id: str
    label: str
    predictions: Mapping[str, tuple[str, float]]
    maps: Sequence[MapView]
    parts: Mapping[str, NDArray[np.floating]]
    own: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """The model's input by run, if it is not `image`, such as a crop."""
    reasons: Mapping[str, Sequence[Panel]] = field(default_factory=dict)
    """Pictures of the reasons by run, such as the prototypes that a model found."""
    totals: Mapping[str, str] = field(default_factory=dict)
    """The sum of these reasons by run, as text."""


@dataclass(frozen=True)
class PrototypeView:
    """The prototypes of one run.

    `rows` are means of prototype metrics with the keys metric, mean, n, percent, higher_is_better and legend.
    `nearest` holds pictures of the images nearest to some prototypes, by their number, and `tree` an SVG or "".
    """

    run: str
    rows: Sequence[Mapping[str, Any]]
    nearest: Mapping[int, NDArray[np.uint8]]
    tree: str = ""
