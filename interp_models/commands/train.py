"""Train a model.

python train.py [CONFIG] [key=value ...]        (a yaml file or a shipped config; the default is quickstart)
python train.py resume=RUN [phases[0].epochs=... trainer.*=... logger.*=... data.dataset.root=...]
python train.py --list                          (the shipped configs)
python train.py --list-runs [FOLDER]            (the default folder is runs)
python train.py --help [NAME ...]               (of models, data, explainers, bcnn, phases, ...)
"""

from collections.abc import Sequence
from pathlib import Path

from interp_models.commands.cli import list_configs, plugins_of, run_script, taken
from interp_models.config.loading import configured
from interp_models.config.shipped import config_path
from interp_models.core.errors import InputError
from interp_models.core.stopping import goes_on_by
from interp_models.core.written import expanded
from interp_models.runs.config import TrainConfig

LIST, LIST_RUNS = "--list", "--list-runs"


def main(positional: list[str], overrides: list[str]) -> Path | None:
    """Read the config, apply the overrides and train; returns the run folder."""
    goes_on_by(lambda: "nothing was trained yet")
    if LIST in positional:
        list_configs(positional, overrides, evaluations=False)
        return None
    if LIST_RUNS in positional:
        from interp_models.runs.listing import run_list  # imports pandas, which is slow

        folders = [name for name in positional if name != LIST_RUNS]
        if len(folders) > 1 or overrides:
            raise InputError(f"{LIST_RUNS} takes one folder at most; got {' '.join([*folders, *overrides])}")
        print(run_list(Path(expanded(folders[0] if folders else "runs"))))
        return None
    resume, overrides = taken(overrides, "resume")
    if len(positional) > 1 or (resume and positional):
        raise InputError(f"one config at most, and none with resume=; got {' '.join(positional)}")
    if resume is not None:
        return _resume(Path(expanded(resume)), overrides)
    config: TrainConfig = configured(TrainConfig, config_path(positional[0] if positional else "quickstart"), overrides)
    from interp_models.runs.building import resolve  # imports the classes that the config names

    config = resolve(config)
    from interp_models.runs.train import train  # takes seconds, so it is not imported before

    return train(config)


def _resume(run: Path, overrides: list[str]) -> Path:
    from interp_models.core.plugins import import_plugins
    from interp_models.runs.loading import run_config
    from interp_models.runs.resume import check_assignment

    for assignment in overrides:
        check_assignment(assignment)
    import_plugins(plugins_of(overrides))  # first, because plugins of the run may have moved
    config: TrainConfig = configured(TrainConfig, run_config(run), overrides)
    from interp_models.runs.building import resolve
    from interp_models.runs.train import train

    return train(resolve(config), run)


def script(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_script(__doc__, TrainConfig, main, arguments)
