"""Files and folders that are written whole or not at all, and never over others."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from interp_models.errors import InputError


def new_folder(parent: Path, prefix: str = "") -> Path:
    """Make and return parent/<prefix><n> with the first n from 0 that does not exist: nothing is ever overwritten.

    Raises:
        InputError: if it cannot be made.
    """
    number = 0
    while True:
        folder = parent / f"{prefix}{number}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            if not folder.exists():
                raise InputError(
                    f"folder {folder.absolute()} cannot be made: {error.strerror}; out= names another"
                ) from None
            number += 1
        else:
            return folder


def empty_folder(out: str, why: str) -> Path:
    """Make and return a folder that holds nothing.

    Raises:
        InputError: if it holds something or cannot be made.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        full = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"out={folder} cannot be made: {error}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"out={folder} cannot be written to")
    if full:
        raise InputError(f"out={folder} is not empty; {why}")
    return folder


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder, that becomes `path` at the end; after an exception nothing is left."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing behind it
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: str) -> None:
    """Write a file whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(data.encode())


def write_json(path: Path, value: Any) -> None:
    """Write json whole or not at all; NaN is not json and raises `ValueError`."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
