"""The tables of an evaluation and their files."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from interp_models.core.errors import InputError
from interp_models.core.files import LOCK, write_json
from interp_models.evaluation.cache import FolderCache
from interp_models.evaluation.differences import Difference, differences, reference_of, same_maps
from interp_models.evaluation.statistics import DEFAULT_CONTROL, compare, paired_tests

SCHEMA_VERSION = 1
"""Version of the format of `results.json`."""
COSTS = ("passes", "seconds")
Maps = Mapping[str, NDArray[np.float32]]
"""The maps of every explainer by label, (N, h, w)."""
Curves = Mapping[str, Mapping[str, NDArray[np.float32]]]
"""Curves of every explainer by label and by key of the metric, (N, 2, T): fractions of the steps, and scores there. The
scores are NaN for a row without a curve."""


@dataclass(frozen=True)
class Provenance:
    """Facts about the model in every row of a table."""

    run: str
    """Name of the model."""
    selection: str
    """How its weights were selected."""
    seed: int | None
    """Seed of its training; None if unknown."""


@dataclass(frozen=True)
class Protocol:
    """How the metric of a row was measured; in every row of a table."""

    preset: str
    """Protocol, such as `gomez2023`."""
    grid: str
    """Grid of the maps, such as `7x7`."""
    steps: int | None
    """Number of steps of the curve; None for a metric without one."""
    fill: str
    """Value of masked pixels."""
    target: str
    """Class that is explained: `prediction`, `label`, or a class number."""
    scorer: str
    """The plan's `preparation`; result files have always called it `scorer`."""
    higher_is_better: bool
    """Direction of the metric."""


@dataclass(frozen=True)
class Tables:
    """The results of an evaluation."""

    per_image: pd.DataFrame
    """A row per explainer, metric and image; if several labels of each image are explained, one for each of them."""
    rows: list[dict[str, Any]]
    """Means, a row per explainer and metric."""
    left_out: dict[str, str]
    """Explainers that do not apply: the reason by label."""
    costs: dict[str, dict[str, float | None]]
    """Costs per image by explainer: `passes` through the model and `seconds`; None if unknown."""
    maps: Maps
    """The maps of every explainer by label, (N, h, w)."""
    listing: pd.DataFrame
    """The image of each row of the maps: `row`, `index`, `image_id`, and if several labels of each image are explained
    `target_class`."""
    without_label: int = 0
    """Number of images that have no row, as they have no label that could be explained."""
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    """Metrics that have no values, as ground truth is unknown: the reason by key."""
    mean_ranks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and standard deviation of each explainer's rank over metrics, see `statistics.mean_ranks`."""
    curves: Curves = field(default_factory=dict)
    """The curves behind the values; empty for results of older versions."""
    of_label: Mapping[str, Mapping[int, NDArray[np.float16]]] = field(default_factory=dict)
    """Maps of the true class (h, w) by explainer and row, for the page: of the rows whose prediction is wrong. A map is
    divided by its largest absolute value."""
    differences: list[dict[str, Any]] = field(default_factory=list)
    """Paired differences from the reference, see `differences.Difference`; empty if there is only one explainer."""

    @property
    def accuracy(self) -> float | None:
        """Share of the images whose prediction is their label, in [0, 1]; None if a label is unknown.

        Of images with several labels, it is the share of those with a label whose prediction is one of their labels;
        None if no image has a label.
        """
        images = self.per_image.drop_duplicates("index")
        if "labels" in images:
            pairs = zip(images["prediction"], images["labels"], strict=True)
            right = [prediction in labels for prediction, labels in pairs if len(labels)]
            return sum(right) / len(right) if right else None
        return float((images["prediction"] == images["label"]).mean()) if (images["label"] >= 0).all() else None


def finished(folder: Path, cache: FolderCache) -> bool:
    """Whether a folder has complete results of the same work, with the maps of all explainers that apply."""
    try:
        results = json.loads((folder / "results.json").read_text())
        if (results["schema_version"], results.get("work")) != (SCHEMA_VERSION, cache.work):
            return False
        listing = pd.read_csv(folder / "maps/index.csv")
        pd.read_parquet(folder / "per_image.parquet", columns=["index"])
        labels = [label for label in cache.folders if label not in results["left_out"]]
        for label in labels:
            _read_shown(folder / "shown" / f"{label}.npz", needed=True)
        maps = [folder / f"maps/{label}.npy" for label in labels]
        return all(len(np.load(path, mmap_mode="r")) == len(listing) for path in maps)
    except Exception:  # a file is missing or broken: the results are written again
        return False


def own_folder(folder: Path, key: str) -> Path:
    """Check the folder of one model's evaluation and return it.

    Args:
        folder: the folder.
        key: the option that names it, for messages.

    Raises:
        InputError: if it holds other files than those of an evaluation, or cannot be made.
    """
    try:
        full = folder.exists() and any(folder.iterdir())
        own = (folder / ".partial").exists() or (folder / LOCK).exists() or _is_ours(folder / "results.json")
        other = full and ((folder / "checkpoints").exists() or not own)
    except OSError as error:
        raise InputError(f"{key}={folder} cannot be read: {error.strerror}") from None
    if other:
        what = "files that are not those of an evaluation"
        raise InputError(f"{key}={folder} holds {what}; name a new folder, or one of an evaluation")
    return folder


def _is_ours(path: Path) -> bool:
    try:
        return bool({"schema_version", "work"} <= json.loads(path.read_text()).keys())
    except (OSError, ValueError, AttributeError):
        return False


def date_of(folder: Path) -> str:
    """Date and time when the results in a folder were finished."""
    return datetime.fromtimestamp((folder / "results.json").stat().st_mtime).isoformat(" ", "minutes")


def read_tables(folder: Path) -> Tables:
    """Read the tables of a finished evaluation. Maps are mapped to memory, so they are read from disk when used.

    Raises:
        InputError: if the folder has no finished evaluation.
    """
    try:
        results = json.loads((folder / "results.json").read_text())
        labels = dict.fromkeys(row["explainer"] for row in results["rows"])
        shown = {label: _read_shown(folder / "shown" / f"{label}.npz") for label in labels}
        return Tables(
            pd.read_parquet(folder / "per_image.parquet"),
            results["rows"],
            results["left_out"],
            results.get("costs", {}),
            {label: np.load(folder / "maps" / f"{label}.npy", mmap_mode="r") for label in labels},
            pd.read_csv(folder / "maps" / "index.csv"),
            results.get("without_label", 0),
            results.get("unmeasured", {}),
            {label: (mean, std) for label, (mean, std) in results.get("mean_ranks", {}).items()},
            {label: curves for label, (curves, _) in shown.items() if curves},
            {label: own for label, (_, own) in shown.items() if own},
            results.get("differences", []),
        )
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise InputError(f"{folder} holds no finished evaluation ({error})") from None


def _read_shown(
    path: Path, *, needed: bool = False
) -> tuple[dict[str, NDArray[np.float32]], dict[int, NDArray[np.float16]]]:
    """The curves of an explainer, and its maps of the true class by row; nothing for results of older versions, unless
    they are needed."""
    if not needed and not path.is_file():
        return {}, {}
    with np.load(path) as file:
        curves = {key.removeprefix("curve "): file[key] for key in file.files if key.startswith("curve ")}
        known = "rows of label" in file.files
        return curves, dict(zip(file["rows of label"].tolist(), file["maps of label"], strict=True)) if known else {}


def compare_again(folder: Path, control: str | None, reference: str | None) -> bool:
    """Compare the explainers of a finished evaluation with another control or reference, from their values per image.

    Returns:
        Whether one of them is another one than before. Then `results.json` is written again.
    """
    tables, path = read_tables(folder), folder / "results.json"
    names = _names(tables.rows)
    wanted = control_of(names, control), reference_of(names, reference)
    controls = {row["control"] for row in tables.rows} - {None}
    references = {one["reference"] for one in tables.differences}
    if (controls, references) == tuple({one} - {None} if len(names) > 1 else set() for one in wanted):
        return False
    found = compared(tables.rows, tables.per_image, tables.maps, control, reference)
    results, stat = json.loads(path.read_text()), path.stat()
    write_json(path, results | {"rows": tables.rows} | found)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the date of the results
    return True


def compared(
    rows: list[dict[str, Any]], per_image: pd.DataFrame, maps: Maps, control: str | None, reference: str | None
) -> dict[str, Any]:
    """Add the comparison with the control to the rows; returns `mean_ranks` and `differences`, as in `Tables`."""
    values, names, same = _values(per_image), _names(rows), same_maps(maps)
    tests, known = paired_tests(values, same), reference_of(names, reference)
    found: list[Difference] = []
    if known is not None:
        better = {row["metric"]: row["higher_is_better"] for row in rows}
        alike = next((group for group in same if known in group), [])
        found = differences(values, tests, known, better, alike)
    ranks = compare(rows, values, tests, control_of(names, control))
    return {"mean_ranks": ranks, "differences": [asdict(one) for one in found]}


def control_of(names: Mapping[str, str], wanted: str | None) -> str | None:
    """Label of the explainer that the others are tested against: the wanted one, or the first that is noise.

    Args:
        names: registered name of each explainer by label.
        wanted: label that was asked for.
    """
    if wanted is not None:
        return wanted if wanted in names else None  # it may not apply
    return next((label for label, name in names.items() if name == DEFAULT_CONTROL), None)


def _names(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Registered name of each explainer by label."""
    return {row["explainer"]: row["options"]["name"] for row in rows}


def _values(per_image: pd.DataFrame) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The values per image by explainer and metric."""
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for (label, key), own in per_image.groupby(["explainer", "metric"], sort=False):
        found.setdefault(str(label), {})[str(key)] = of_images(own)
    return found


def read_prototypes(folder: Path) -> dict[str, Any]:
    """Read `prototypes.json`, the result of an evaluation of prototypes; empty if the folder has none."""
    path = folder / "prototypes.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def image_means(index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The mean over the rows of each image of the defined values.

    Args:
        index: image of each row, int64 (N,).
        values: (N,); NaN is undefined.

    Returns:
        (n,), in the order of the images' indices; NaN for an image without a defined value. If every image has one row,
        the values as they are.

    >>> image_means(torch.tensor([4, 4, 1]), torch.tensor([0.0, 1.0, 3.0])).tolist()
    [3.0, 0.5]
    """
    images, of_row = torch.unique(index, return_inverse=True)
    if len(images) == len(index):
        return values
    defined = ~values.isnan()
    total = values.new_zeros(len(images)).index_add(0, of_row[defined], values[defined])
    return total / values.new_zeros(len(images)).index_add(0, of_row[defined], torch.ones_like(values[defined]))


def of_images(frame: pd.DataFrame) -> NDArray[np.float64]:
    """The values of one explainer and metric per image, by index: the mean over the rows of an image."""
    index = torch.tensor(frame["index"].to_numpy())
    found: NDArray[np.float64] = image_means(index, torch.tensor(frame["value"].to_numpy(np.float64))).numpy()
    return found
