"""Make the tables of an evaluation from the batches of its cache."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from interp_models.core.distances import distance
from interp_models.core.distributed import is_first
from interp_models.core.errors import InputError
from interp_models.core.files import whole, write_json, write_whole
from interp_models.evaluation.cache import Cache, FolderCache, Part
from interp_models.evaluation.statistics import interval
from interp_models.evaluation.tables import COSTS, SCHEMA_VERSION, Protocol, Provenance, Tables, compared, of_images
from interp_models.metrics.base import owner_of


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

    With a folder, it also writes `maps/`, `shown/`, `per_image.parquet` and, as the last file, `results.json`. Then it
    removes the files of the cache.

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
    curves: dict[str, dict[str, NDArray[np.float32]]] = {}
    of_label: dict[str, dict[int, NDArray[np.float16]]] = {}
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
        curves[label], of_label[label] = _curves(parts), _of_label(parts)
        if folder is not None:
            _write_shown(folder / "shown" / f"{label}.npz", curves[label], of_label[label])
        maps[label] = _maps(None if folder is None else folder / "maps" / f"{label}.npy", parts, grid)
    table = pd.concat(frames, ignore_index=True)
    comparison = compared(rows, table, maps, control, reference)
    if folder is not None:
        assert isinstance(cache, FolderCache)
        write_whole(folder / "maps" / "index.csv", listing.to_csv(index=False))
        with whole(folder / "per_image.parquet") as path:
            table.to_parquet(path)
        for path in (*(folder / "maps").glob("*.npy"), *(folder / "shown").glob("*.npz")):
            if path.stem not in explainers:
                path.unlink()  # of an earlier evaluation; the new index.csv does not describe its rows
        results = {
            "schema_version": SCHEMA_VERSION, "work": cache.work, "rows": rows, "left_out": dict(left_out),
            "costs": costs, **comparison, **({"without_label": without_label} if without_label else {}),
            **({"unmeasured": dict(unmeasured)} if unmeasured else {}),
        }  # fmt: skip
        write_json(folder / "results.json", results)  # the last file: where it names this work, all files exist
        cache.clear()
    return Tables(
        table, rows, dict(left_out), costs, maps, listing, without_label, dict(unmeasured or {}),
        curves={label: own for label, own in curves.items() if own},
        of_label={label: own for label, own in of_label.items() if own}, **comparison,
    )  # fmt: skip


def _listing(parts: Sequence[Part], image_id: Callable[[int], str], protocols: Mapping[str, Protocol]) -> pd.DataFrame:
    """The image of each row of the maps and, for several rows per image, the class."""
    index, target = _keys(parts)
    order = _order(parts)
    listing = pd.DataFrame({"row": np.arange(len(index)), "index": index[order]})
    listing["image_id"] = [image_id(int(position)) for position in listing["index"]]
    if "labels" in parts[0]["common"] and any(protocol.target == "label" for protocol in protocols.values()):
        listing["target_class"] = target[order]
    return listing


def _keys(parts: Sequence[Part]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of the image and class explained of every row of the parts."""
    index, target = (np.concatenate([p["common"][key].numpy() for p in parts]) for key in ("index", "target_class"))
    return index, target


def _order(parts: Sequence[Part]) -> NDArray[np.int64]:
    """The rows of the parts, one after the other, in the order of the tables and maps: by image, then by class."""
    index, target = _keys(parts)
    return np.lexsort((target, index))


def values_of(parts: Sequence[Part], key: str) -> torch.Tensor:
    """The values (N,) of a metric's key for all rows of the parts."""
    owner = owner_of(key)
    assert owner is not None
    return owner.over_images(key, torch.cat([part["values"][key] for part in parts]))


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


def _maps(path: Path | None, parts: Sequence[Part], grid: tuple[int, int]) -> NDArray[np.float32]:
    """The maps of an explainer, float32 (N, h, w), sorted by index of the image and by class. With a path, they are
    written batch by batch to a file that is mapped to memory."""
    row_of = np.argsort(_order(parts))
    shape = (len(row_of), *grid)
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


def _curves(parts: Sequence[Part]) -> dict[str, NDArray[np.float32]]:
    """The curves of an explainer, sorted as its maps. Scores are NaN where the metric's value is undefined."""
    order, found = _order(parts), {}
    for key in dict.fromkeys(key for part in parts for key in part["curves"]):
        known = next(part["curves"][key] for part in parts if key in part["curves"])
        missing = torch.stack([known[0, 0], torch.full_like(known[0, 0], torch.nan)])
        each = [part["curves"].get(key, missing.expand(len(part["maps"]), -1, -1)) for part in parts]
        curves = torch.cat(each)
        if key in parts[0]["values"]:
            curves[values_of(parts, key).isnan(), 1] = torch.nan
        found[key] = curves.numpy()[order]
    return found


def _of_label(parts: Sequence[Part]) -> dict[int, NDArray[np.float16]]:
    """The maps of the true class by row of the maps."""
    row_of, first = np.argsort(_order(parts)), 0
    found: dict[int, NDArray[np.float16]] = {}
    for part in parts:
        own = part.get("of_label", ())
        found |= {int(row_of[first + row]): map.numpy() for row, map in enumerate(own) if not bool(map.isnan().any())}
        first += len(part["maps"])
    return dict(sorted(found.items()))


def _write_shown(
    path: Path, curves: Mapping[str, NDArray[np.float32]], of_label: Mapping[int, NDArray[np.float16]]
) -> None:
    """Write what only the page shows of an explainer; `tables.read_tables` reads it."""
    arrays: dict[str, Any] = {f"curve {key}": own for key, own in curves.items()}
    if of_label:
        arrays |= {"rows of label": np.array(list(of_label)), "maps of label": np.stack(list(of_label.values()))}
    path.parent.mkdir(exist_ok=True)
    with whole(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
