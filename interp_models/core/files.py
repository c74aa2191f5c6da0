"""Files that are written whole or not at all, new folders, and locks on folders."""

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
"""Lock file of a folder; the process that writes there holds its lock."""
LONGEST_NAME = 180
"""Maximum length in bytes of a file's name without its ending. Systems allow 255; `whole` adds some."""
HOLDER = ".lock-holder"
"""File with the name of the process that holds the lock. The lock file itself may hold filelock's own record."""


def new_folder(parent: Path, prefix: str = "") -> Path:
    """Make and return the folder parent/<prefix><n> with the first free number n, from 0.

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
    """Make and return the folder `out`, which may exist if it is empty.

    Args:
        out: the folder.
        why: end of the message if the folder is not empty.

    Raises:
        InputError: if it is not empty or cannot be made.
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


def folder_of_several(out: str | None, kind: str) -> Path:
    """Make and return the folder of a comparison or an ensemble: `out`, or runs/<kind>/<n>.

    Args:
        out: the folder to make.
        kind: `comparisons` or `ensembles`.

    Raises:
        InputError: if `out` already holds files or cannot be made.
    """
    if out is None:
        return new_folder(Path("runs") / kind)
    return empty_folder(out, f"{kind} are never overwritten")


def short(name: str) -> str:
    """A file name without its ending; a name that is too long is cut and gets a digest.

    >>> short("robin")
    'robin'
    """
    data = os.fsencode(name)
    if len(data) <= LONGEST_NAME:
        return name
    return f"{data[:LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a partial file to write to, and rename it to `path` at the end; an exception removes it.

    The partial file lies in the same folder and has a unique name. If two processes write the same file, the last one
    remains, whole.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # without it a power cut may leave an empty file
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
    """Write json whole or not at all; NaN, which json does not have, raises `ValueError`."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def locked(folder: Path, work: str, advice: str = "wait for its end") -> Iterator[None]:
    """Lock a folder, so that only one process at a time writes there. The folder is made if it does not exist.

    The system frees the lock when the process ends, even if it is killed. Partial files of killed processes are
    removed.

    Args:
        folder: the folder to write to.
        work: the work of this process, such as `an evaluation`.
        advice: what to do if another process holds the lock.

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
            if left.parent == folder or not (left.parent / LOCK).exists():  # otherwise another process may use it
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
    """A one-line message for an error caused by a full or read-only disk; None for other errors."""
    cause = _no_room(error)
    if cause is not None:
        folder = "the folder that is written to" if cause.filename is None else Path(cause.filename).parent
        return NO_ROOM[cause.errno or 0].format(folder)
    if "No space left on device" in str(error):  # torch: the shared memory of loader processes
        return f"no space left: {str(error).strip().splitlines()[-1]}"
    return None


def _no_room(error: BaseException | None) -> OSError | None:
    """The `NO_ROOM` error that caused an error: torch.save raises other errors while it cleans up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None
