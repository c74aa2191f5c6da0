"""Files and folders that are written whole or not at all, never over others, and by one process at a time."""

import errno
import hashlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from interp_models.core.errors import InputError

LOCK = ".lock"
"""The file in a folder that the process which writes there holds locked."""
LONGEST_NAME = 180
"""Bytes of a file's name without its ending; systems take 255, of which `whole` needs some."""
HOLDER = ".lock-holder"
"""The file that names that process. On disks without locks the lock file holds filelock's own record."""


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


def short(name: str) -> str:
    """A name for a file without its ending: cut, with a digest, where it is too long for one.

    >>> short("robin")
    'robin'
    """
    data = os.fsencode(name)
    if len(data) <= LONGEST_NAME:
        return name
    return f"{data[:LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, in the same folder, that becomes `path` at the end; after an exception nothing is left.

    Its name is unique, so that two processes may write the same file: the last one stays, whole.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave an empty file
        os.replace(partial, path)
    except BaseException as error:
        if (cause := _no_room(error)) and cause.filename is None:
            cause.filename = str(path)  # write errors name no file
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: str) -> None:
    """Write a file whole or not at all."""
    with whole(path) as partial:
        partial.write_bytes(data.encode())


def write_json(path: Path, value: Any) -> None:
    """Write json whole or not at all; NaN is not json and raises `ValueError`."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def locked(folder: Path, work: str, advice: str = "wait for its end") -> Iterator[None]:
    """Hold a folder's lock, so that one process at a time writes there; the folder is made if it does not exist.

    The system frees the lock of a process that ends, however it ends. What a killed process left half written is
    removed.

    Args:
        folder: what is written to.
        work: what is done there, such as `an evaluation`.
        advice: what somebody can do who comes second.

    Raises:
        InputError: if another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        holder = ""
        with suppress(OSError):
            holder = (folder / HOLDER).read_text(errors="replace").strip()
        raise InputError(f"{folder} is in use by {holder or 'another process'}; {advice}") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}), which {work} needs") from None
    try:
        now = datetime.now().isoformat(" ", "seconds")
        with suppress(OSError):
            (folder / HOLDER).write_text(f"{work} of process {os.getpid()} on {socket.gethostname()} since {now}")
        for left in [*folder.glob(".*.partial"), *folder.glob("*/.*.partial")]:
            if left.parent == folder or not (left.parent / LOCK).exists():  # else another process may be using it
                with suppress(OSError):
                    left.unlink()
        yield
    finally:
        lock.release()


NO_ROOM = {
    errno.ENOSPC: "no space left in {}",
    errno.EDQUOT: "the disk quota is used up in {}",
    errno.EROFS: "{} is on a file system that is read-only",
}


def unwritable(error: BaseException) -> str | None:
    """One line for an error caused by a full or read-only disk; None for other errors."""
    cause = _no_room(error)
    if cause is not None:
        folder = "the folder that is written to" if cause.filename is None else Path(cause.filename).parent
        return NO_ROOM[cause.errno or 0].format(folder)
    if "No space left on device" in str(error):  # torch: the shared memory of loader processes
        return f"no space left: {str(error).strip().splitlines()[-1]}"
    return None


def _no_room(error: BaseException | None) -> OSError | None:
    """The `NO_ROOM` error behind an error: torch.save raises others while it cleans up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None
