"""Files of an evaluation: what an interrupted one leaves, and the tables and maps of a finished one."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp_models.core.errors import InputError
from interp_models.core.files import whole, write_json, write_whole

SCHEMA_VERSION = 1
"""Of `results.json`."""
METHOD_VERSION = 3
"""Increase it when an explainer or metric changes its numbers or applies to more models: stored results of other
versions are then computed anew."""

Part = dict[str, Any]
"""One batch by one explainer: `common` (index, label, prediction, ... by image), `maps` (n, h, w), `values` by key."""


@dataclass(frozen=True)
class Provenance:
    """What every row says of its run."""

    run: str
    selection: str
    """How the checkpoint was chosen."""
    seed: int
    """Of the training."""


@dataclass(frozen=True)
class Protocol:
    """What every row says of how its metric was measured."""

    preset: str
    grid: str
    steps: int | None
    fill: str
    target: str
    scorer: str
    higher_is_better: bool


class PartialResults:
    """Batches that are done, one file per batch and explainer, in folders named by digests of the work.

    Another checkpoint, protocol or option has another folder, so nothing stale is ever found; another list of
    explainers leaves the parts of those that stay.

    Args:
        folder: of the evaluation.
        work: what the values of every explainer depend on.
        explainers: label -> what else this explainer's values depend on.
    """

    def __init__(self, folder: Path, work: Any, explainers: Mapping[str, Any]) -> None:
        self.work = _digest([METHOD_VERSION, work, list(explainers.items())])
        self.results = folder
        self.common = folder / ".partial" / _digest([METHOD_VERSION, work])
        self.folders = {label: self.common / f"{label}-{_digest(spec)}" for label, spec in explainers.items()}

    def finished(self) -> bool:
        """Whether the results of this very work are there, whole, with the maps of all explainers that apply."""
        try:
            results = json.loads((self.results / "results.json").read_text())
            if (results["schema_version"], results.get("work")) != (SCHEMA_VERSION, self.work):
                return False
            listing = pd.read_csv(self.results / "maps/index.csv")
            pd.read_parquet(self.results / "per_image.parquet", columns=["index"])
            maps = [self.results / f"maps/{label}.npy" for label in self.folders if label not in results["left_out"]]
            return all(len(np.load(path, mmap_mode="r")) == len(listing) for path in maps)
        except Exception:  # a file is missing or broken: all is written anew
            return False

    def date(self) -> str:
        """When the results were finished."""
        return datetime.fromtimestamp((self.results / "results.json").stat().st_mtime).isoformat(" ", "minutes")

    def _file(self, label: str, index: Tensor) -> Path:
        return self.folders[label] / f"{int(index[0])}-{len(index)}.pt"

    def keep(self, label: str, part: Part) -> None:
        """Write a part whole or not at all."""
        path = self._file(label, part["common"]["index"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:  # of a path, torch.save would not say what failed
            torch.save({key: _to_cpu(value) for key, value in part.items()}, file)

    def find(self, label: str, index: Tensor) -> Part | None:
        """The part of these images, if it was kept."""
        path = self._file(label, index)
        part = _read(path) if path.is_file() else None
        return part if part is not None and torch.equal(part["common"]["index"], index.cpu()) else None

    def of(self, label: str, indices: set[int]) -> list[Part]:
        """What was kept of an explainer for the wanted images, every image once.

        Parts may overlap: an interrupted evaluation may have cut or drawn its images differently.
        """
        found: list[Part] = []
        left = set(indices)
        for path in sorted(self.folders[label].glob("*.pt"), key=lambda path: int(path.stem.split("-")[0])):
            if (part := _read(path)) is None:
                continue
            index = part["common"]["index"].tolist()
            rows = [row for row, number in enumerate(index) if number in left]
            if rows:
                found.append(part if len(rows) == len(index) else _rows(part, rows))
                left -= set(index)
        return found

    def clear(self) -> None:
        """Remove what evaluations have left, but for other explainers' parts of this very work: these may belong to a
        longer list that was interrupted. The folder's lock is held, so that no other evaluation is at work there."""
        for folder in (self.results / ".partial").glob("*/*"):
            if folder.parent != self.common or folder.name.rpartition("-")[0] in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
        for above in (*(self.results / ".partial").glob("*"), self.results / ".partial"):
            if above.is_dir() and not any(above.iterdir()):
                above.rmdir()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(path: Path) -> Part | None:
    """A part, None if it is broken: it is computed again."""
    try:
        part: Part = torch.load(path, weights_only=True)
    except Exception:
        return None
    return part


def _rows(value: Any, rows: list[int]) -> Any:
    return {key: _rows(item, rows) for key, item in value.items()} if isinstance(value, Mapping) else value[rows]


def _to_cpu(value: Any) -> Any:
    return {key: _to_cpu(item) for key, item in value.items()} if isinstance(value, Mapping) else value.cpu()


def read_prototypes(folder: Path) -> dict[str, Any]:
    """What the evaluation of a model's prototypes has left in a folder; empty if there is none."""
    path = folder / "prototypes.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def write_results(
    folder: Path,
    partial: PartialResults,
    indices: Sequence[int],
    explainers: Mapping[str, str],
    left_out: Mapping[str, str],
    protocols: Callable[[tuple[int, int]], Mapping[str, Protocol]],
    provenance: Provenance,
    image_id: Callable[[int], str],
) -> None:
    """Write `maps/`, `per_image.parquet` and at last `results.json`, and remove the partial results.

    Args:
        folder: where.
        partial: the batches.
        indices: positions of the images in the test set.
        explainers: label -> name and options, as json, of those that apply.
        left_out: label -> why an explainer does not apply.
        protocols: the grid of an explainer's maps -> the protocol of every key.
        provenance: of the rows.
        image_id: position in the test set -> name of the image.

    Raises:
        InputError: if a planned image has no part, as of a process whose files are not seen here; the evaluation is
            then not finished.
    """
    (folder / "results.json").unlink(missing_ok=True)  # from here on the files are no longer those it tells of
    frames, rows = [], []
    for label, options in explainers.items():
        parts = partial.of(label, set(indices))
        if lost := len(indices) - sum(len(part["common"]["index"]) for part in parts):
            raise InputError(
                f"{folder}: {lost} of {len(indices)} images have no result of {label}; all processes must see one "
                "folder. Repeat the command to judge those images"
            )
        grid = (int(parts[0]["maps"].shape[-2]), int(parts[0]["maps"].shape[-1]))
        frame = _per_image(label, options, parts, protocols(grid), provenance, image_id)
        frames.append(frame)
        rows += [_row(frame[frame["metric"] == key], protocol) for key, protocol in protocols(grid).items()]
        _write_maps(folder / "maps", label, parts, grid, image_id)
    table = pd.concat(frames, ignore_index=True)
    with whole(folder / "per_image.parquet") as path:
        table.to_parquet(path)
    results = {"schema_version": SCHEMA_VERSION, "work": partial.work, "rows": rows, "left_out": dict(left_out)}
    for path in (folder / "maps").glob("*.npy"):
        if path.stem not in explainers:
            path.unlink()  # of an evaluation before, whose rows the new index.csv does not name
    write_json(folder / "results.json", results)  # the last: where it names this work, all of it is there
    partial.clear()


def _per_image(
    label: str,
    options: str,
    parts: Sequence[Part],
    protocols: Mapping[str, Protocol],
    provenance: Provenance,
    image_id: Callable[[int], str],
) -> pd.DataFrame:
    """Long rows, one per metric and image."""
    common = {key: torch.cat([part["common"][key] for part in parts]).numpy() for key in parts[0]["common"]}
    names = [image_id(int(index)) for index in common["index"]]
    frames = []
    for key, protocol in protocols.items():
        columns = {**asdict(provenance), "explainer": label, "options": options, "metric": key, **asdict(protocol)}
        frame = pd.DataFrame({"image_id": names, **common})
        frame["value"] = torch.cat([part["values"][key] for part in parts]).numpy()
        for position, (name, value) in enumerate(columns.items()):
            frame.insert(position, name, value)
        frames.append(frame.sort_values("index"))
    return pd.concat(frames, ignore_index=True)


def _row(frame: pd.DataFrame, protocol: Protocol) -> dict[str, Any]:
    """One row of `results.json`; the standard deviation is that of the images judged (divisor n)."""
    first, values = frame.iloc[0], frame["value"].to_numpy(np.float64)
    defined = values[~np.isnan(values)]
    return {
        "run": str(first["run"]),
        "explainer": str(first["explainer"]),
        "options": json.loads(str(first["options"])),
        "metric": str(first["metric"]),
        "mean": float(defined.mean()) if len(defined) else None,
        "std": float(defined.std()) if len(defined) else None,
        "n": len(values),
        "n_undefined": len(values) - len(defined),
        **asdict(protocol),
        "selection": str(first["selection"]),
        "seed": int(first["seed"]),
    }


def _write_maps(
    folder: Path, label: str, parts: Sequence[Part], grid: tuple[int, int], image_id: Callable[[int], str]
) -> None:
    """`<label>.npy`, float32 (N, h, w), written batch by batch, and `index.csv` that names its rows."""
    folder.mkdir(exist_ok=True)
    index = np.concatenate([part["common"]["index"].numpy() for part in parts])
    row_of = np.argsort(np.argsort(index))
    with whole(folder / f"{label}.npy") as path:
        maps = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(index), *grid))
        if hasattr(os, "posix_fallocate"):  # on a full disk, writing to mapped memory would kill the process
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        first = 0
        for part in parts:
            maps[row_of[first : first + len(part["maps"])]] = part["maps"].numpy()
            first += len(part["maps"])
        maps.flush()
    listing = pd.DataFrame({"row": np.arange(len(index)), "index": np.sort(index)})
    listing["image_id"] = [image_id(int(position)) for position in listing["index"]]
    write_whole(folder / "index.csv", listing.to_csv(index=False))
