"""Files and folders that are written whole or not at all, and never over others."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def new_folder(parent: Path, prefix: str = "") -> Path:
    """Make and return parent/<prefix><n> with the first n from 0 that does not exist: nothing is ever overwritten."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = parent / f"{prefix}{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
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
    except BaseException as error:
        if (cause := _no_room(error)) and cause.filename is None:
            cause.filename = str(path)  # errors of writing name no file
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: str) -> None:
    """Write a file whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(data.encode())


def write_json(path: Path, value: Any) -> None:
    """Write json whole or not at all; NaN is not json and raises `ValueError`."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


NO_ROOM = {
    errno.ENOSPC: "no space left in {}",
    errno.EDQUOT: "the disk quota is used up in {}",
    errno.EROFS: "{} is on a file system that is read-only",
}


def unwritable(error: BaseException) -> str | None:
    """One line for an error behind which is a disk that is full or read-only; None for another error."""
    cause = _no_room(error)
    if cause is not None:
        folder = "the folder that is written to" if cause.filename is None else Path(cause.filename).parent
        return NO_ROOM[cause.errno or 0].format(folder)
    if "No space left on device" in str(error):  # torch's, of memory that loader processes share
        return f"no space left: {str(error).strip().splitlines()[-1]}"
    return None


def _no_room(error: BaseException | None) -> OSError | None:
    """The error of `NO_ROOM` that an error came of: torch.save raises others while it tidies up after one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None
