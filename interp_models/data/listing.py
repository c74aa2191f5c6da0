"""Find images in folders and lists, with class and split. Nothing is decoded."""

import csv
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from interp_models.core.errors import InputError, unknown
from interp_models.data.base import printable
from interp_models.data.decoding import endings

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of the splits, for folders and in lists; upper and lower case do not matter."""
LITTER = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin"}
"""Files that operating systems create, in lower case."""
NO_IMAGES, OUTSIDE, LINKS = "files that are no images", "images outside class folders", "links to a folder above"

LeftOut = dict[str, list[str]]
"""Names of files and folders that are not read, by kind."""


class Found(NamedTuple):
    """An image file."""

    path: Path
    name: str
    """Its path in the data set."""
    label: str
    split: str
    """`train`, `val`, `test`, or empty if unknown."""


def is_hidden(name: str) -> bool:
    """Whether a name begins with a dot or is a file that operating systems create."""
    return name.startswith(".") or name.lower() in LITTER


def split_of(name: str) -> str | None:
    """The split that the name of a folder or a word in a list means; None if it means none."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted, without hidden ones.

    Raises:
        InputError: if the folder cannot be read.
    """
    _, folders, files = next(os.walk(folder, onerror=_unreadable))
    return _shown(folders), _shown(files)


def files_of(folders: Sequence[tuple[Path, str]], root: Path, split: str) -> tuple[list[Found], LeftOut]:
    """The images in class folders, at any depth, with their class; sorted by folder, then by name."""
    found: list[Found] = []
    left_out: LeftOut = defaultdict(list)
    for folder, label in folders:
        images = []
        for top, name in _below(folder, root, left_out):
            if _is_image(name):
                images.append((top, name))
            else:
                left_out[NO_IMAGES].append(_relative(Path(top, name), root))
        for top, name in sorted(images):
            found.append(Found(Path(top, name), Path(top, name).relative_to(root).as_posix(), label, split))
    return found, left_out


def stray(folder: Path, root: Path) -> LeftOut:
    """Files in a folder that should contain only folders."""
    left_out: LeftOut = defaultdict(list)
    for name in entries(folder)[1]:
        left_out[OUTSIDE if _is_image(name) else NO_IMAGES].append(_relative(folder / name, root))
    return left_out


def read_list(file: Path, root: Path) -> list[Found]:
    """Read the images of a CSV file with the columns `path`, `label` and optionally `split`, in its order.

    Paths are relative to the root, or to the folder of the list if the first path exists only there.

    Raises:
        InputError: if the list cannot be read, a column, path, label or split is missing, a split is unknown, or a path
            occurs twice.
    """
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            reader = csv.DictReader(lines, skipinitialspace=True)
            columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, csv.Error) as error:
        raise InputError(f"list {file} cannot be read: {error}") from None
    if len(set(columns)) < len(columns):
        raise InputError(f"list {file}: its first line names a column twice: {','.join(columns)!r}")
    if missing := {"path", "label"} - set(columns):
        raise InputError(
            f"list {file}: its first line must name the columns path,label or path,label,split; "
            f"{' and '.join(sorted(missing))} not found in {','.join(columns)!r}"
        )
    base: Path | None = None
    seen: dict[str, int] = {}
    found: list[Found] = []
    for number, row in rows:
        where = f"list {file}, line {number}"
        if None in row or None in row.values():
            raise InputError(f"{where}: expected {len(columns)} values, {','.join(columns)}")
        path, label, word = row["path"], row["label"].strip(), row.get("split", "").strip()
        if not path or not label:
            raise InputError(f"{where}: a path and a label are needed")
        split = split_of(word) if "split" in columns else ""
        if split is None:
            raise unknown(f"split in {where}:", word, SPLITS)
        base = base or next((top for top in (root, file.parent) if (top / path).exists()), root)
        first = seen.setdefault(os.path.normpath(base / path), number)
        if first != number:
            raise InputError(f"{where}: {printable(path)} is already in line {first}")
        found.append(Found(base / path, path, label, split))
    if not found:
        raise InputError(f"list {file} names no image")
    return found


def joined(*parts: Mapping[str, Sequence[str]]) -> LeftOut:
    """Join the names of several parts by kind."""
    return {kind: sorted({name for part in parts for name in part.get(kind, ())}) for part in parts for kind in part}


@cache
def _endings() -> frozenset[str]:
    return endings()


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _endings()


def _shown(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not is_hidden(name))


def _relative(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())


def _below(folder: Path, root: Path, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Folder and name of every file below a folder; links are followed, unless they lead to a folder above."""
    own = os.path.realpath(folder)
    for top, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        folders[:] = _shown(folders)
        for name in list(folders):
            # A link to a folder above would add other classes, endlessly
            if os.path.islink(path := os.path.join(top, name)):
                target = os.path.realpath(path)
                if f"{os.path.realpath(top)}/".startswith(f"{target}/") or f"{own}/".startswith(f"{target}/"):
                    folders.remove(name)
                    left_out[LINKS].append(_relative(Path(path), root))
        for name in _shown(files):
            yield top, name


def _unreadable(error: OSError) -> None:
    raise InputError(f"folder {error.filename} cannot be read: {error.strerror}") from None
