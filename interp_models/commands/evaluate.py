"""Judge the maps of trained models, their own and post-hoc ones, by the same metrics on the same images.

python evaluate.py RUN [RUN ...] [key=value ...]
python evaluate.py NETWORK [key=value ...] dataset.name=... (timm:NAME, package.module:function or FILE.py:function)
python evaluate.py --ensemble RUN RUN [...] [key=value ...] (accuracy of their averaged probabilities)
python evaluate.py --list                                   (the shipped configs)
python evaluate.py --help [NAME ...]                        (of explainers, metrics, gradcam, grid, ...)
Defaults come from eval/faithfulness, or from config=CONFIG, a yaml file or the name of a shipped config.
Results go to RUN/evaluation; with a single model, out=FOLDER names another folder.
"""

import os
import re
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
from interp_models.evaluation.config import EvaluateConfig
from interp_models.runs.config import EnsembleConfig

DEFAULT = "eval/faithfulness"
LIST = "--list"
ENSEMBLE = "--ensemble"


def main(positional: list[str], overrides: list[str]) -> Path | None:
    """Read the config, apply the overrides and evaluate; returns the path of the results."""
    goes_on_by(lambda: "repeat the command to go on")
    if LIST in positional:
        list_configs(positional, overrides, evaluations=True)
        return None
    if ENSEMBLE in positional:
        return _ensemble([name for name in positional if name != ENSEMBLE], overrides)
    networks = [name for name in positional if is_network(name)]
    runs = [Path(expanded(name)) for name in positional if name not in networks]
    source, overrides = taken(overrides, "config")
    config: EvaluateConfig = configured(EvaluateConfig, config_path(source or DEFAULT), overrides)
    if config.userstudy == "read":
        from interp_models.runs.evaluate import read_answers

        return read_answers(runs, config)
    if not positional and not config.networks:
        raise InputError(f"no run given; write {command('evaluate')} RUN [RUN ...] [key=value ...]")
    import_plugins(config.plugins)
    from interp_models.runs.evaluate import evaluate  # takes seconds, so it is not imported before

    return evaluate(runs, config, networks)


def _ensemble(runs: list[str], overrides: list[str]) -> Path:
    config: EnsembleConfig = configured(EnsembleConfig, {}, overrides)
    import_plugins(config.plugins)
    from interp_models.runs.ensemble import ensemble

    return ensemble([Path(expanded(run)) for run in runs], config)


def is_network(name: str) -> bool:
    """Whether an argument names a network, not a run folder."""
    return re.fullmatch(r"timm:.+|.+\.py:\w+|[\w.]+:\w+", name) is not None and not os.path.exists(name)


def script(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_script(__doc__, EvaluateConfig, main, arguments)
