"""Train a model.

python train.py [CONFIG.yaml] [key=value ...]   (without a config: configs/quickstart.yaml)
python train.py resume=RUN [phases[0].epochs=... trainer.*=... logger.*=... data.dataset.root=...]
python train.py --list-runs [FOLDER]            (without a folder: runs)
"""

from collections.abc import Sequence
from pathlib import Path

from interp_models.commands.cli import config_path, run_script, taken
from interp_models.config.loading import configured
from interp_models.core.errors import InputError
from interp_models.core.stopping import goes_on_by
from interp_models.core.written import expanded
from interp_models.runs.config import TrainConfig
from interp_models.runs.listing import run_list
from interp_models.runs.loading import run_config
from interp_models.runs.resume import (
    check_assignment,
)
from interp_models.runs.train import train

LIST = "--list-runs"


def main(positional: list[str], overrides: list[str]) -> Path | None:
    """Read the config, apply the overrides, train."""
    goes_on_by(lambda: "nothing was trained yet")
    if LIST in positional:
        folders = [name for name in positional if name != LIST]
        if len(folders) > 1 or overrides:
            raise InputError(f"{LIST} takes one folder at most; got {' '.join([*folders, *overrides])}")
        print(run_list(Path(expanded(folders[0] if folders else "runs"))))
        return None
    resume, overrides = taken(overrides, "resume")
    if len(positional) > 1 or (resume and positional):
        raise InputError(f"one config at most, and none with resume=; got {' '.join(positional)}")
    if resume is None:
        path = config_path(positional[0] if positional else "configs/quickstart.yaml")
        return train(configured(TrainConfig, path, overrides))
    for assignment in overrides:
        check_assignment(assignment)
    run = Path(expanded(resume))
    return train(configured(TrainConfig, run_config(run), overrides), run)


def script(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_script(__doc__, TrainConfig, main, arguments)
