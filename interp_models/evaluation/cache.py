"""Cache of an evaluation: the maps and values of each batch and explainer, in memory or in files."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from interp_models.core.distributed import gathered_objects
from interp_models.core.files import whole

METHOD_VERSION = 12
"""Increase it when an explainer or metric changes its numbers or applies to more models, or when a `Part` gets another
form. Results of other versions are then computed again."""


Part = dict[str, Any]
"""Result of one explainer for one batch: `common` (index, label, target_class, prediction, ...), `maps` (n, h, w),
`values` by key of the metric, `curves` (see `metrics.case.Case`), `costs` (seconds and passes). There is a row per
image; if the labels of images with several are explained, there is a row per image and label, and the rows of an image
are in one batch. `of_label`, the maps of the true class for images whose prediction is wrong, is there if the batch has
one. `features` are sums over the whole batch, see `core.distances`; a part of a batch has none."""


class Cache(Protocol):
    """Interface of a cache."""

    def keep(self, label: str, part: Part) -> None:
        """Add a batch of an explainer."""

    def find(self, label: str, index: Tensor) -> Part | None:
        """The batch of an explainer with exactly these rows, by index of the image; None if there is none."""

    def of(self, label: str, indices: set[int]) -> list[Part]:
        """All batches of an explainer, limited to the wanted images; every image and class occurs once."""


class MemoryCache:
    """Cache in memory. It holds the batches of this rank; `gather` adds those of all ranks.

    Args:
        maps: whether to keep the maps.
    """

    def __init__(self, *, maps: bool = True) -> None:
        self.maps = maps
        self._parts: dict[str, list[Part]] = {}

    def keep(self, label: str, part: Part) -> None:
        """Add a batch of an explainer, moved to the CPU."""
        kept = part if self.maps else {key: value for key, value in part.items() if key not in ("maps", "curves")}
        self._parts.setdefault(label, []).append({key: _to_cpu(value) for key, value in kept.items()})

    def find(self, label: str, index: Tensor) -> Part | None:
        """Return None: with this cache every batch comes once."""
        return None

    def gather(self) -> None:
        """Give every rank the batches of all ranks, in the order of the ranks."""
        parts: dict[str, list[Part]] = {}
        for of_rank in gathered_objects(self._parts):
            for label, own in of_rank.items():
                parts.setdefault(label, []).extend(own)
        self._parts = parts

    def of(self, label: str, indices: set[int]) -> list[Part]:
        """All batches of an explainer, limited to the wanted images; every image and class occurs once."""
        return _each_once(self._parts.get(label, []), indices)


class FolderCache:
    """Cache in files: one file per batch and explainer, in folders named by digests.

    Another checkpoint, protocol or option has another folder, so outdated results are never found. If only the list of
    explainers changes, results of the remaining explainers are found again.

    Args:
        folder: folder of the evaluation.
        work: what the values of all explainers depend on.
        explainers: for each label, what else the values of this explainer depend on.
    """

    def __init__(self, folder: Path, work: Any, explainers: Mapping[str, Any]) -> None:
        self.work = _digest([METHOD_VERSION, work, list(explainers.items())])
        """Digest of everything that the results depend on."""
        self.results = folder
        self.common = folder / ".partial" / _digest([METHOD_VERSION, work])
        self.folders = {label: self.common / f"{label}-{_digest(spec)}" for label, spec in explainers.items()}

    def _file(self, label: str, index: Tensor) -> Path:
        return self.folders[label] / f"{int(index[0])}-{len(index)}.pt"

    def keep(self, label: str, part: Part) -> None:
        """Add a batch of an explainer; its file is written whole or not at all."""
        path = self._file(label, part["common"]["index"])
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:  # given a path, torch.save hides the cause of an error
            torch.save({key: _to_cpu(value) for key, value in part.items()}, file)

    def find(self, label: str, index: Tensor) -> Part | None:
        """The batch of an explainer with exactly these rows, by index of the image; None if there is none."""
        path = self._file(label, index)
        part = _read(path) if path.is_file() else None
        return part if part is not None and torch.equal(part["common"]["index"], index.cpu()) else None

    def of(self, label: str, indices: set[int]) -> list[Part]:
        """All batches of an explainer, limited to the wanted images; every image and class occurs once.

        Batches in files may overlap: an interrupted evaluation may have had other batches or other images.
        """
        paths = sorted(self.folders[label].glob("*.pt"), key=lambda path: int(path.stem.split("-")[0]))
        return _each_once((part for path in paths if (part := _read(path)) is not None), indices)

    def clear(self) -> None:
        """Remove the files of this and of earlier evaluations.

        Files of other explainers with the same work stay: they may belong to a longer list that was interrupted. The
        caller holds the folder's lock, so no other evaluation writes there.
        """
        for folder in (self.results / ".partial").glob("*/*"):
            if folder.parent != self.common or folder.name.rpartition("-")[0] in self.folders:
                shutil.rmtree(folder, ignore_errors=True)
        for above in (*(self.results / ".partial").glob("*"), self.results / ".partial"):
            if above.is_dir() and not any(above.iterdir()):
                above.rmdir()


def _each_once(parts: Iterable[Part], indices: set[int]) -> list[Part]:
    found: list[Part] = []
    left = set(indices)
    for part in parts:
        index = part["common"]["index"].tolist()
        keys = list(zip(index, part["common"]["target_class"].tolist(), strict=True))
        rows = [row for row, number in enumerate(index) if number in left]
        left -= set(index)
        if len(rows) == len(set(keys)) == len(keys):
            found.append(part)
        elif rows:
            of_rows = {key: value for key, value in part.items() if key != "features"}
            found.append(_rows(of_rows, list({keys[row]: row for row in rows}.values())))
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(path: Path) -> Part | None:
    """The batch in a file, mapped to memory; None if the file is broken, so that it is computed again."""
    try:
        part: Part = torch.load(path, weights_only=True, mmap=True)
    except Exception:
        return None
    return part


def _rows(value: Any, rows: list[int]) -> Any:
    return {key: _rows(item, rows) for key, item in value.items()} if isinstance(value, Mapping) else value[rows]


def _to_cpu(value: Any) -> Any:
    return {key: _to_cpu(item) for key, item in value.items()} if isinstance(value, Mapping) else value.cpu()
