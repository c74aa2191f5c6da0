"""Judge the maps of trained models: their own and post-hoc ones, by the same metrics on the same images.

python evaluate.py RUN [RUN ...] [key=value ...]
python evaluate.py ensemble=[RUN,RUN,...] [key=value ...]   (accuracy of their averaged probabilities)
python evaluate.py --list                                   (the configs that are shipped)
python evaluate.py --help [NAME ...]                        (of explainers, metrics, gradcam, grid, ...)
Defaults are those of eval/faithfulness, or of config=CONFIG, a yaml file or a shipped name.
Results go to RUN/evaluation; those of one run to out=FOLDER where that is given.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from interp_models.commands.cli import list_configs, run_script, taken
from interp_models.config.loading import configured
from interp_models.config.shipped import config_path
from interp_models.core.command import command
from interp_models.core.errors import InputError
from interp_models.core.plugins import import_plugins
from interp_models.core.stopping import goes_on_by
from interp_models.core.written import expanded
from interp_models.runs.config import EvaluateConfig

DEFAULT = "eval/faithfulness"
LIST = "--list"


def main(positional: list[str], overrides: list[str]) -> Path | None:
    """Read the config, apply the overrides, evaluate."""
    goes_on_by(lambda: "repeat the command to go on")
    if LIST in positional:
        list_configs(positional, overrides, only="eval")
        return None
    given = any(override.startswith("ensemble=") for override in overrides)
    if given and positional:
        raise InputError(f"ensemble= names its runs itself; got {' '.join(positional)} too")
    if not positional and not given:
        raise InputError(f"no run given; write {command('evaluate')} RUN [RUN ...] [key=value ...]")
    source, overrides = taken(overrides, "config")
    config: EvaluateConfig = configured(EvaluateConfig, config_path(source or DEFAULT), overrides)
    import_plugins(config.plugins)
    from interp_models.runs.evaluate import ensemble, evaluate  # loads all that an evaluation needs, seconds

    if given:
        if not any(o.startswith("n_images=") for o in overrides):
            config = dataclasses.replace(config, n_images=None)  # that of the yaml is for maps
        return ensemble([Path(run) for run in config.ensemble], config)
    return evaluate([Path(expanded(run)) for run in positional], config)


def script(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_script(__doc__, EvaluateConfig, main, arguments)
