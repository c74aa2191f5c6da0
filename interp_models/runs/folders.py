"""Run folders and their names."""

import os
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from interp_models.core.errors import InputError
from interp_models.core.files import empty_folder, new_folder
from interp_models.runs.config import TrainConfig


@rank_zero_only
def run_folder(config: TrainConfig, resume: Path | None = None) -> Path | None:
    """Make and return the folder of a new run, or return that of a resumed run.

    Args:
        config: names a new folder by `out`, or as runs/<experiment>/<seed>-<n>.
        resume: folder of the run to resume.

    Returns:
        The folder on rank 0; None on other ranks, which do not write.

    Raises:
        InputError: if `out` already holds files or cannot be made, `experiment` is no name of a folder below runs/, or
            `resume` cannot be written to.
    """
    if resume is not None:
        if not os.access(resume, os.W_OK):
            raise InputError(f"run {resume} cannot be written to")
        return resume
    if config.out is None:
        path = Path(config.experiment)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InputError(f"experiment must be the name of a folder below runs/; got {config.experiment!r}")
        return new_folder(Path("runs") / config.experiment, f"{config.seed}-")
    return empty_folder(config.out, f"runs are never overwritten (resume={config.out} goes on with it)")


def run_name(run: Path) -> str:
    """The name of a run in tables: the names of its parent folder and its own, usually `<experiment>/<seed>-<n>`."""
    path = run.resolve()
    return f"{path.parent.name}/{path.name}"
