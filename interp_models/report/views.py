"""Data for the report page."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RunSummary:
    """One model on the page."""

    name: str
    """Name of the run or network."""
    model: str
    """Kind of model."""
    dataset: str
    """Name of the data set."""
    accuracy: float | None
    """Accuracy of the test after training, in [0, 1]; None if unknown."""
    n: int
    """Number of images of this test."""
    accuracy_judged: float | None
    """Accuracy on the judged images, in [0, 1]; None without labels."""
    n_judged: int
    """Number of judged images."""
    seed: int | None
    """Seed of the training; None if unknown."""
    selection: str
    """How the weights were selected: "best validation epoch", "last epoch", or "as given"."""
    measure: str = "accuracy"
    """What `accuracy` is: for several labels per image, "mean average precision"."""
    without_label: int = 0
    """Number of images without a label to explain; they are not judged."""
    training: str = ""
    """Cost of the training in words; empty if it is not known."""


@dataclass(frozen=True)
class RunResults:
    """What was measured of one model, and what it says."""

    run: str
    rows: Sequence[Mapping[str, Any]]
    """Means, one per explainer and metric, as in `results.json`."""
    costs: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Costs per image by explainer: `passes` and `seconds`."""
    mean_ranks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and standard deviation of each explainer's rank over metrics."""
    differences: Sequence[Mapping[str, Any]] = ()
    """Paired differences from the reference, as in `results.json`."""
    headline: str = ""
    """The answer in words."""
    groups: Sequence[str] = ()
    """All other explainers against the reference, a line for each way in which the metrics agree."""
    notes: Sequence[str] = ()
    """What limits the answer."""
    curves: Mapping[str, Mapping[str, NDArray[np.float32]]] = field(default_factory=dict)
    """Curves by explainer and metric, (N, 2, T): fractions and scores."""
    controls: Collection[str] = ()
    """Labels of explainers that are controls."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Explainers and metrics that do not apply, with the reasons."""


@dataclass(frozen=True)
class MapView:
    """The map of one explainer for one image. Constant maps, and maps with NaN or infinite values, get a remark."""

    run: str
    explainer: str
    heatmap: NDArray[np.floating]
    """(h, w): the map on the explainer's own grid; it can have negative values."""
    scores: Mapping[str, float | None]
    """Values of the metrics by key; None is undefined."""
    curves: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    """Curves by key of the metric, (2, T): fractions and scores."""
    of_label: NDArray[np.floating] | None = None
    """(h, w): the map of the true class, if another class was predicted and explained."""


@dataclass(frozen=True)
class Panel:
    """A prototype or part that was found in an image: a picture (H, W, 3) and a remark."""

    number: int
    picture: NDArray[np.uint8]
    remark: str
    kind: Literal["prototype", "part"] = "prototype"


@dataclass(frozen=True)
class ImageView:
    """One image with the predictions and maps of each run."""

    image: NDArray[np.uint8]
    """(H, W, 3): the picture."""
    image_id: str
    """Name of the image."""
    label: str
    """Name of its class; of several labels, their names."""
    predictions: Mapping[str, tuple[str, float]]
    """Predicted class name and its probability by run; see `is_right`."""
    maps: Sequence[MapView]
    """Maps of all runs and explainers."""
    parts: Mapping[str, NDArray[np.floating]]
    """Two or three of the model's own maps by run, (n, h, w), to draw as red, green and blue."""
    own: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """The model's input by run, if it differs from `image`, such as a crop."""
    reasons: Mapping[str, Sequence[Panel]] = field(default_factory=dict)
    """Pictures that explain the prediction by run, such as the prototypes that a model found."""
    totals: Mapping[str, str] = field(default_factory=dict)
    """One line by run that sums up the reasons."""
    labels: Sequence[str] | None = None
    """Names of its labels, if an image can have several."""
    explained: str = ""
    """Name of the class that the maps explain, if each of several labels has maps of its own."""
    right: Mapping[str, bool] = field(default_factory=dict)
    """Whether the prediction is a label of the image, by run. Of a run that is missing here, names are compared; they
    need not be unique."""

    def is_right(self, run: str) -> bool:
        """Whether a run's prediction is the image's class, or one of its labels."""
        if run in self.right:
            return self.right[run]
        predicted = self.predictions[run][0]
        return predicted == self.label if self.labels is None else predicted in self.labels


@dataclass(frozen=True)
class PrototypeView:
    """The prototypes of one run."""

    run: str
    rows: Sequence[Mapping[str, Any]]
    """Means of prototype metrics, with the keys metric, mean, n, percent, higher_is_better and legend."""
    nearest: Mapping[int, NDArray[np.uint8]]
    """Pictures of the nearest images by number of the prototype."""
    tree: str = ""
    """The tree as SVG; empty if the model has none."""
