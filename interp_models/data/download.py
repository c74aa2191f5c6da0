"""Downloads of archives: a folder is complete or does not appear."""

import shutil
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

from interp_models.core.errors import InputError


def download_archive(url: str, md5: str | None, target: Path) -> None:
    """Download an archive that contains a folder with the name of `target`, and put this folder at `target`.

    The folder appears only when it is complete. An interrupted download leaves its files in `target`.partial. A
    complete archive there is not downloaded again, if its MD5 is known.

    Raises:
        InputError: if the download fails.
    """
    work = target.with_name(f"{target.name}.partial")
    unpacked = work / "unpacked"
    try:
        shutil.rmtree(unpacked if md5 else work, ignore_errors=True)
        download_and_extract_archive(url, work, unpacked, md5=md5)
        (unpacked / target.name).rename(target)
        shutil.rmtree(work)
    except (OSError, EOFError, RuntimeError, HTTPException) as error:
        raise InputError(f"cannot download {url} (MD5 {md5 or 'unknown'}) to {target}: {error}") from None
