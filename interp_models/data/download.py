"""Downloads of archives: complete, or nothing."""

import shutil
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets.utils import download_and_extract_archive

from interp_models.core.errors import InputError


def download_archive(url: str, md5: str | None, target: Path) -> None:
    """Fetch an archive that holds a folder named like `target`, and put it there: the whole folder or none.

    What an interrupted download leaves lies in `target`.partial; a whole archive there is not fetched again, if its MD5
    is known.

    Raises:
        InputError: if that fails.
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
