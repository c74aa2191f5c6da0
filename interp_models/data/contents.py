"""Digests of images and their ground truth, as keys of cached results."""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from interp_models.core.errors import InputError
from interp_models.core.files import write_whole
from interp_models.data.base import ImageDataset, Sample
from interp_models.data.decoding import missing

MEMORY = ".images.json"
"""File with sizes, times and digests of image files, so that an unchanged file is not read again."""
SETTLED = 2_000_000_000
"""Nanoseconds. A file that changed more recently gets no entry: another change in the same clock tick would leave the
same time."""


def content_digests(
    images: ImageDataset, indices: Iterable[int], folder: Path | None = None, *, shown: bool = False
) -> list[str]:
    """Digests of images: each changes if a pixel, the class or other ground truth of the image changes.

    Args:
        images: the data set. Images without files are loaded and their pixels are digested, unless `annotation`
            determines them (`drawn`).
        indices: the images.
        folder: folder of the file `MEMORY`. A file with the same size and times as there is not read again. None reads
            every file.
        shown: whether to show a progress bar.

    Raises:
        InputError: if a file cannot be read; the message names it.
    """
    memory = None if folder is None else folder / MEMORY
    known = _read(memory) if memory else {}
    found: dict[str, list[int | str]] = {}
    digests = []
    for index in tqdm(list(indices), "checking images", unit="image", leave=False, disable=not shown, delay=2):
        digest = hashlib.sha256(images.annotation(index).encode(errors="surrogatepass"))
        files = images.files(index)
        for path in files:
            digest.update(_file_digest(path, known, found).encode())
        if not files and not images.drawn:
            digest.update(_pixels(images.load(index)))
        digests.append(digest.hexdigest()[:16])
    if memory and found:
        with suppress(OSError):  # if it cannot be written, files are read again next time
            write_whole(memory, json.dumps({**known, **found}))
    return digests


def together(digests: Iterable[str]) -> str:
    """One digest of several digests; it depends on their order."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _file_digest(path: Path, known: dict[str, list[int | str]], found: dict[str, list[int | str]]) -> str:
    try:
        state = path.stat()
        # ctime also changes if a file is replaced by one of the same size and mtime, as by `cp -p`.
        name, traits = str(path.absolute()), [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        if name in known and known[name][:-1] == traits:
            return str(known[name][-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise InputError(f"image {path} cannot be read ({error.strerror})") from None
    if time.time_ns() - max(traits[1:]) > SETTLED:
        found[name] = [*traits, digest]
    return digest


def _pixels(sample: Sample) -> bytes:
    digest = hashlib.sha256()
    for value in (*sample[:1], *sample[3:]):
        if value is not None:
            array = np.ascontiguousarray(value.as_subclass(Tensor).numpy())
            digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.digest()


def _read(memory: Path) -> dict[str, list[int | str]]:
    """The entries of the file `MEMORY`; empty if it is missing or broken."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
