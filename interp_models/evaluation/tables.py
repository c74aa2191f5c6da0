"""The tables of an evaluation and their files."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from interp_models.core.distances import distance
from interp_models.core.distributed import is_first
from interp_models.core.errors import InputError
from interp_models.core.files import LOCK, whole, write_json, write_whole
from interp_models.evaluation.cache import Cache, FolderCache, Part
from interp_models.evaluation.differences import Difference, differences, reference_of, same_maps
from interp_models.evaluation.statistics import DEFAULT_CONTROL, compare, interval
from interp_models.metrics.base import owner_of

SCHEMA_VERSION = 1
"""Version of the format of `results.json`."""
COSTS = ("passes", "seconds")
Maps = Mapping[str, NDArray[np.float32]]
"""The maps of every explainer by label, (N, h, w)."""


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
        maps = [folder / f"maps/{label}.npy" for label in cache.folders if label not in results["left_out"]]
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
            results.get("differences", []),
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} holds no finished evaluation ({error})") from None


def compare_again(folder: Path, control: str | None, reference: str | None) -> bool:
    """Compare the explainers of a finished evaluation with another control or reference, from their values per image.

    Returns:
        Whether one of them is another one than before. Then `results.json` is written again.
    """
    tables, path = read_tables(folder), folder / "results.json"
    wanted = control or DEFAULT_CONTROL
    tested = {wanted} if wanted in tables.maps and len(tables.maps) > 1 else set()
    referred = {reference_of(_names(tables.rows), reference)} - {None}
    if tested == {row["control"] for row in tables.rows} - {None} and referred == {
        row["reference"] for row in tables.differences
    }:
        return False
    compared = _compared(tables.rows, tables.per_image, tables.maps, control, reference)
    results, stat = json.loads(path.read_text()), path.stat()
    write_json(path, results | {"rows": tables.rows} | compared)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the date of the results
    return True


def _compared(
    rows: list[dict[str, Any]], per_image: pd.DataFrame, maps: Maps, control: str | None, reference: str | None
) -> dict[str, Any]:
    """Add the comparison with the control to the rows; returns `mean_ranks` and `differences`, as in `Tables`."""
    values, known = _values(per_image), reference_of(_names(rows), reference)
    found: list[Difference] = []
    if known is not None:
        better = {row["metric"]: row["higher_is_better"] for row in rows}
        found = differences(values, known, better, same_maps(maps, known))
    return {"mean_ranks": compare(rows, values, control), "differences": [asdict(one) for one in found]}


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


def make_tables(
    cache: Cache,
    indices: Sequence[int],
    explainers: Mapping[str, str],
    left_out: Mapping[str, str],
    protocols: Callable[[tuple[int, int]], Mapping[str, Protocol]],
    provenance: Provenance,
    image_id: Callable[[int], str],
    folder: Path | None = None,
    without_label: int = 0,
    unmeasured: Mapping[str, str] | None = None,
    control: str | None = None,
    reference: str | None = None,
) -> Tables:
    """Make the tables from the batches of a cache.

    With a folder, it also writes `maps/`, `per_image.parquet` and, as the last file, `results.json`. Then it removes
    the files of the cache.

    Args:
        cache: the batches.
        indices: positions of the images in their data set, without those that have no label to explain.
        explainers: explainers that apply: name and options as json, by label.
        left_out: explainers that do not apply: the reason by label.
        protocols: maps the grid of an explainer's maps to the protocol of every metric key.
        provenance: facts about the model for the rows.
        image_id: maps a position in the data set to the name of the image.
        folder: folder of the results, the same as that of the `FolderCache`.
        without_label: number of images that have no label to explain; a line on stderr names it.
        unmeasured: metrics without values: the reason by key.
        control: label of the explainer that the others are tested against, see `statistics.compare`.
        reference: label of the explainer that the others are compared with, see `differences.reference_of`.

    Raises:
        InputError: if an image has no result, for example because files of another process are not visible here. The
            evaluation is then not finished.
    """
    if folder is not None:
        (folder / "results.json").unlink(missing_ok=True)  # the files that it describes are overwritten from here on
    frames, rows, maps = [], [], {}
    costs: dict[str, dict[str, float | None]] = {}
    listing = pd.DataFrame()
    if without_label and is_first():
        who = "1 image has no label and was" if without_label == 1 else f"{without_label} images have no label and were"
        print(f"{who} not explained (target=label)", file=sys.stderr)
    for label, options in explainers.items():
        parts = cache.of(label, set(indices))
        if lost := len(indices) - len({index for part in parts for index in part["common"]["index"].tolist()}):
            where = "" if folder is None else f"{folder}: "
            raise InputError(
                f"{where}{lost} of {len(indices)} images have no result of {label}; all processes must see the same "
                "folder. Repeat the command to judge these images"
            )
        grid = (int(parts[0]["maps"].shape[-2]), int(parts[0]["maps"].shape[-1]))
        frame = _per_image(label, options, parts, protocols(grid), provenance, image_id)
        frames.append(frame)
        listing = _listing(parts, image_id, protocols(grid)) if listing.empty else listing
        for key, protocol in protocols(grid).items():
            rows.append(_row(frame[frame["metric"] == key], protocol) | {"distance": _distance(parts, key)})
        costs[label] = {key: _mean([part["costs"][key] for part in parts], len(indices)) for key in COSTS}
        maps[label] = _maps(None if folder is None else folder / "maps" / f"{label}.npy", parts, grid)
    table = pd.concat(frames, ignore_index=True)
    compared = _compared(rows, table, maps, control, reference)
    if folder is not None:
        assert isinstance(cache, FolderCache)
        write_whole(folder / "maps" / "index.csv", listing.to_csv(index=False))
        with whole(folder / "per_image.parquet") as path:
            table.to_parquet(path)
        for path in (folder / "maps").glob("*.npy"):
            if path.stem not in explainers:
                path.unlink()  # of an earlier evaluation; the new index.csv does not describe its rows
        results = {
            "schema_version": SCHEMA_VERSION, "work": cache.work, "rows": rows, "left_out": dict(left_out),
            "costs": costs, **compared, **({"without_label": without_label} if without_label else {}),
            **({"unmeasured": dict(unmeasured)} if unmeasured else {}),
        }  # fmt: skip
        write_json(folder / "results.json", results)  # the last file: where it names this work, all files exist
        cache.clear()
    return Tables(table, rows, dict(left_out), costs, maps, listing, without_label, dict(unmeasured or {}), **compared)


def _listing(parts: Sequence[Part], image_id: Callable[[int], str], protocols: Mapping[str, Protocol]) -> pd.DataFrame:
    """The image of each row of the maps and, for several rows per image, the class."""
    index, target = _keys(parts)
    order = np.lexsort((target, index))
    listing = pd.DataFrame({"row": np.arange(len(index)), "index": index[order]})
    listing["image_id"] = [image_id(int(position)) for position in listing["index"]]
    if "labels" in parts[0]["common"] and any(protocol.target == "label" for protocol in protocols.values()):
        listing["target_class"] = target[order]
    return listing


def _keys(parts: Sequence[Part]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of the image and class explained of every row of the parts; tables and maps are sorted by them."""
    index, target = (np.concatenate([p["common"][key].numpy() for p in parts]) for key in ("index", "target_class"))
    return index, target


def values_of(parts: Sequence[Part], key: str) -> torch.Tensor:
    """The values (N,) of a metric's key for all rows of the parts."""
    owner = owner_of(key)
    assert owner is not None
    return owner.over_images(key, torch.cat([part["values"][key] for part in parts]))


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


def _mean(values: Sequence[torch.Tensor], images: int) -> float | None:
    """The sum over all rows per image; None if a value is NaN."""
    of_rows = torch.cat(list(values))
    mean = float(of_rows.mean()) * (len(of_rows) / images)
    return None if math.isnan(mean) else mean


def _distance(parts: Sequence[Part], key: str) -> float | None:
    """The distance of the images that were perturbed for a metric's key from the clean ones; None if it is unknown."""
    known = [part["features"] for part in parts if key in part.get("features", ())]
    if not known:
        return None
    clean, own = (torch.stack([sums[name] for sums in known]).sum(dim=0) for name in ("clean", key))
    return distance(clean, own)


def _per_image(
    label: str,
    options: str,
    parts: Sequence[Part],
    protocols: Mapping[str, Protocol],
    provenance: Provenance,
    image_id: Callable[[int], str],
) -> pd.DataFrame:
    """Rows of one explainer, one per metric and row of the parts."""
    common: dict[str, Any] = {
        key: torch.cat([part["common"][key] for part in parts]).numpy() for key in parts[0]["common"]
    }
    if "labels" in common:
        common["labels"] = [np.flatnonzero(row) for row in common["labels"]]
    names = [image_id(int(index)) for index in common["index"]]
    frames = []
    for key, protocol in protocols.items():
        columns = {**asdict(provenance), "explainer": label, "options": options, "metric": key, **asdict(protocol)}
        frame = pd.DataFrame({"image_id": names, **common})
        frame["value"] = values_of(parts, key).numpy()
        for position, (name, value) in enumerate(columns.items()):
            frame.insert(position, name, value)
        frames.append(frame.sort_values(["index", "target_class"]))
    return pd.concat(frames, ignore_index=True)


def _row(frame: pd.DataFrame, protocol: Protocol) -> dict[str, Any]:
    """One row of `results.json`; the standard deviation has the divisor n.

    All numbers are over images: the values of several labels of an image are averaged first, because they are not
    independent.
    """
    first, values = frame.iloc[0], of_images(frame)
    defined = values[~np.isnan(values)]
    low, high = interval(defined)
    return {
        "run": str(first["run"]),
        "explainer": str(first["explainer"]),
        "options": json.loads(str(first["options"])),
        "metric": str(first["metric"]),
        "mean": float(defined.mean()) if len(defined) else None,
        "std": float(defined.std()) if len(defined) else None,
        "low": low,
        "high": high,
        "n": len(values),
        "n_undefined": len(values) - len(defined),
        **asdict(protocol),
        "selection": str(first["selection"]),
        "seed": None if pd.isna(first["seed"]) else int(first["seed"]),
    }


def of_images(frame: pd.DataFrame) -> NDArray[np.float64]:
    """The values of one explainer and metric per image, by index: the mean over the rows of an image."""
    index = torch.tensor(frame["index"].to_numpy())
    found: NDArray[np.float64] = image_means(index, torch.tensor(frame["value"].to_numpy(np.float64))).numpy()
    return found


def _maps(path: Path | None, parts: Sequence[Part], grid: tuple[int, int]) -> NDArray[np.float32]:
    """The maps of an explainer, float32 (N, h, w), sorted by index of the image and by class. With a path, they are
    written batch by batch to a file that is mapped to memory."""
    index, target = _keys(parts)
    row_of = np.argsort(np.lexsort((target, index)))
    shape = (len(index), *grid)
    if path is None:
        in_memory: NDArray[np.float32] = _filled(np.empty(shape, np.float32), parts, row_of)
        return in_memory
    path.parent.mkdir(exist_ok=True)
    with whole(path) as partial:
        maps = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        if hasattr(os, "posix_fallocate"):  # writing to mapped memory would kill the process if the disk is full
            with partial.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        _filled(maps, parts, row_of).flush()
    written: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return written


def _filled(maps: Any, parts: Sequence[Part], row_of: NDArray[np.int64]) -> Any:
    """Write the maps of all batches to their rows."""
    first = 0
    for part in parts:
        maps[row_of[first : first + len(part["maps"])]] = part["maps"].numpy()
        first += len(part["maps"])
    return maps
