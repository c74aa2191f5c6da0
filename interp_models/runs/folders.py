"""Run folders and their names."""

import os
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from interp_models.core.errors import InputError
from interp_models.core.files import empty_folder, new_folder
from interp_models.runs.config import TrainConfig


@rank_zero_only
def run_folder(config: TrainConfig, resume: Path | None = None) -> Path | None:
    """The folder of a run: the one that goes on, or a new one; None on other ranks than 0, which write nothing there.

    Args:
        config: names a new folder by `out`, or as runs/<experiment>/<seed>-<n>.
        resume: the run that goes on.

    Raises:
        InputError: if `out` already holds something or cannot be made.
    """
    if resume is not None:
        if not os.access(resume, os.W_OK):
            raise InputError(f"run {resume} cannot be written to")
        return resume
    if config.out is None:
        return new_folder(Path("runs") / config.experiment, f"{config.seed}-")
    return empty_folder(config.out, f"runs are never overwritten (resume={config.out} goes on with it)")


@rank_zero_only
def folder_of_several(out: str | None, kind: str) -> Path | None:
    """Make and return the folder of `comparisons` or `ensembles`: `out`, or runs/<kind>/<n>; None on ranks above 0.

    Raises:
        InputError: if `out` already holds something or cannot be made.
    """
    if out is None:
        return new_folder(Path("runs") / kind)
    return empty_folder(out, f"{kind} are never overwritten")


def run_name(run: Path) -> str:
    """`<experiment>/<seed>-<n>`, or the folder's own name and its parent's."""
    path = run.resolve()
    return f"{path.parent.name}/{path.name}"
