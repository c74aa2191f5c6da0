"""What the two scripts share: arguments, `--help`, and one clear line for bad input."""

import contextlib
import inspect
import logging
import os
import re
import select
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only

from interp_models.commands.stopping import Stopped, StopsRanks, end_with_parent, how_to_go_on, stop_of, stoppable
from interp_models.config.describe import describe
from interp_models.core.errors import InputError, unknown
from interp_models.core.files import unwritable
from interp_models.core.registry import Registry
from interp_models.core.schema import parse, schema_of
from interp_models.core.written import expanded
from interp_models.data.base import DATASETS
from interp_models.data.module import DataModule
from interp_models.explainers.base import EXPLAINERS
from interp_models.metrics.base import METRICS
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS
from interp_models.models.cnn import CNN
from interp_models.prototypes.sources import needs_every_class
from interp_models.training.module import MODELS, InterpModule


def run_script(
    usage: str | None,
    schema: type,
    run: Callable[[list[str], list[str]], object],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a script's function on its arguments without `=` and its overrides; returns the exit code.

    Bad input ends in one line on stderr and exit code 2, without a traceback; a signal in one line that says how to go
    on, and 128 + its number. Options with dashes are those that the usage names.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end_with_parent()
    try:
        with stoppable():
            if any(argument in ("-h", "--help") for argument in arguments):
                print(help_text(usage or "", schema))
            else:
                run(*separated(arguments, re.findall("--[a-z-]+", usage or "")))
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except BaseException as error:
        stop = stop_of(error)
        if stop is not None:
            return stopped(stop)
        if isinstance(error, BrokenPipeError) and output_is_gone():
            return 128 + signal.SIGPIPE
        if (line := unwritable(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def separated(arguments: Sequence[str], options: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Arguments without `=`, and overrides; raises `InputError` for an option that does not exist."""
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            shown = argument.encode(errors="backslashreplace").decode()
            raise InputError(
                f"{shown}: a name given here must be UTF-8, as config.yaml is; a link of another name helps"
            )
        key, sign, value = argument.partition("=")
        if sign and not key:
            raise InputError(f"{argument!r} is not an override; write key=value, without spaces around =")
        if sign and not value.strip():
            none = f"{key}=null is none"
            raise InputError(f"{argument!r} has no value; write key=value, without spaces around =; {none}")
        if argument.startswith("-") and not sign and argument not in options:
            known = f" or {', '.join(options)}" if options else ""
            raise InputError(f"unknown option {argument}; options are written key=value, see --help{known}")
    named = [argument for argument in arguments if "=" not in argument or Path(argument).exists()]
    return named, [argument for argument in arguments if argument not in named]


def stopped(stop: Stopped) -> int:
    """Say how to go on after a signal; returns the exit code.

    Only rank 0 prints. Other ranks return 0, because Lightning kills rank 0 when one ends with another code.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return 0
    with contextlib.suppress(OSError):  # the terminal may be gone
        if sys.stderr.isatty():  # where a progress bar has the line
            print(file=sys.stderr)
        print(f"stopped by {stop}; {how_to_go_on()}", file=sys.stderr)
    return 128 + stop.number


def output_is_gone() -> bool:
    """Whether nobody reads stdout any more, as after `| head`; if so, what is left to write is dropped."""
    out = sys.stdout.fileno()
    poll = select.poll()
    poll.register(out, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return gone


def taken(overrides: Sequence[str], key: str) -> tuple[str | None, list[str]]:
    """The value of an override that is no key of the config, and the other overrides."""
    found = [override for override in overrides if override.startswith(f"{key}=")]
    if len(found) > 1:
        raise InputError(f"{key}= is given twice: {' '.join(found)}")
    value = found[0].partition("=")[2] if found else None
    return value, [override for override in overrides if override not in found]


REPOSITORY = Path(__file__).parents[1]


def config_path(name: str) -> Path:
    """A config file; one that is not there is looked for in the repository of the scripts, which ships some."""
    path = Path(expanded(name))
    return REPOSITORY / path if not path.exists() and (REPOSITORY / path).is_file() else path


def one_line(error: BaseException) -> str:
    """The error's own line; an error raised in a loader's worker process carries that process's traceback before it."""
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix(f"{InputError.__module__}.").removeprefix("InputError: ")


def help_text(usage: str, schema: type) -> str:
    """Usage, the keys of the config, and everything registered with its options."""
    parts = [usage.strip(), "\nKeys (key=value, lists as phases[0].epochs=1):", describe(schema)]
    parts += ["\ndata.", describe(schema_of(DataModule))]
    registries: list[tuple[str, Registry[Any], tuple[str, ...]]] = [
        ("data.dataset.name", DATASETS, ("split",)),
        ("model.name", MODELS, ("num_classes",)),
        ("explainers", EXPLAINERS, ("model",)),
    ]
    for title, registry, given in registries:
        for name in registry.names():
            parts += [f"\n{title}: {name}", *filter(None, [describe(schema_of(registry.get(name), given))])]
    parts.append("\nphases[i].then")
    parts += [f"  of {name}: {', '.join(MODELS.get(name).actions)}" for name in MODELS.names()]
    keys = ", ".join(key for name in METRICS.names() for key in METRICS.get(name).keys)
    return "\n".join([*parts, f"\nmetrics: {keys}", f"\nprototype_metrics: {', '.join(PROTOTYPE_METRICS.names())}"])


SET_BY_SCRIPTS = {"logger", "callbacks", "max_epochs", "default_root_dir", "use_distributed_sampler", "plugins"}
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "log_every_n_steps": 1, "num_sanity_val_steps": -1}
"""Least values of options that Lightning takes as they are."""


def check_trainer(options: Mapping[str, Any], refused: Mapping[str, str]) -> tuple[dict[str, Any], pl.Trainer]:
    """Options for `pl.Trainer`, and a trainer made of them that has seen nothing yet.

    One process is the default, so that a result does not depend on the machine.

    Args:
        options: as given.
        refused: option -> what to do instead.

    Raises:
        InputError: for an option that does not exist, is refused, or is the scripts' own affair, and for a value that
            cannot work.
    """
    known = [name for name in inspect.signature(pl.Trainer).parameters if name not in SET_BY_SCRIPTS]
    for key, value in options.items():
        if key in SET_BY_SCRIPTS:
            raise InputError(f"trainer.{key} is set by the script and cannot be given")
        if key not in known:
            raise unknown("key in trainer:", key, known)
        if key in refused:
            raise InputError(f"trainer.{key} cannot be given; {refused[key]}")
        if key.startswith("limit_") and value == 0:
            raise InputError(f"trainer.{key} must not be 0; data.val_fraction=0 trains without validation")
        if key == "precision" and str(value) in ("bf16-true", "16-true"):
            raise InputError(f"trainer.precision={value} is not supported; bf16-mixed and 16-mixed are")
        if key == "strategy" and isinstance(value, str) and value not in STRATEGIES:
            raise InputError(f"trainer.strategy={value} is not supported; {', '.join(STRATEGIES)} are")
        if key == "deterministic" and value not in (True, False, None, "warn"):
            raise InputError(f"trainer.deterministic must be true, false or warn; got {value!r}")
    options = {"devices": 1, **options, **_checked_types(options)}
    for key, least in LEAST.items():
        if options.get(key) is not None and not options[key] >= least:
            raise InputError(f"trainer.{key} must be at least {least}; got {options[key]}")
    trial = make_trainer(logger=False, enable_checkpointing=False, **options)
    cores = max(2, os.cpu_count() or 1)
    if trial.strategy.root_device.type == "cpu" and trial.num_devices > cores:
        raise InputError(f"trainer.devices={trial.num_devices}: this machine has {cores} CPU cores")
    return options, trial


def _checked_types(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are numbers, truth values or names, as Lightning does not check what it is given."""
    plain = {bool, int, float, str, type(None)}
    hints = typing.get_type_hints(pl.Trainer.__init__)
    other = [name for name, hint in hints.items() if not {*(typing.get_args(hint) or [hint])} <= plain]
    mine = {key: value for key, value in options.items() if key not in other}
    checked = parse(schema_of(pl.Trainer, given=other), mine, "trainer")
    return {key: checked[key] for key in mine}


def make_trainer(*, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    """A trainer that leaves signals to `run_script`; `InputError` for values that Lightning refuses."""
    try:
        trainer = pl.Trainer(callbacks=[*callbacks, StopsRanks()], **options)
    except (MisconfigurationException, ImportError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"trainer: {' '.join(str(error).split())}") from None
    # Lightning would end a training at SIGTERM as if it were done.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, also of worker processes."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}; got {seed}")
    pl.seed_everything(seed, workers=True, verbose=False)


def check_data(data: DataModule, model: InterpModule) -> None:
    """Raise `InputError`, before any training, for files that are missing or broken, and for classes without a training
    image whose prototypes are to become patches of one."""
    data.check_files("train", "val", "test")
    without = data.classes_without("train")
    if without and needs_every_class(model):
        names = f"{', '.join(without[:5])}{', ...' * (len(without) > 5)}"
        raise InputError(f"prototypes of a class need a training image of it; there is none of {len(without)}: {names}")


@rank_zero_only
def tell_data(*modules: DataModule) -> None:
    """Say on stderr which images are worked on and what is left out, once of data sets that are the same."""
    for summary in dict.fromkeys(data.summary() for data in modules):
        print(f"data: {summary}", file=sys.stderr, flush=True)


def tell_head(model: InterpModule, data: DataModule) -> None:
    """Say on stderr if the classifier of a file of weights was taken for the data's classes."""
    if isinstance(model, CNN) and (line := model.keep_head(data.classes)) is not None:
        rank_zero_only(print)(line, file=sys.stderr)


def quiet() -> None:
    """Hush advice that does not apply here."""
    # Lightning's notices: which devices it found, products of its maker, that a callback of the module is used.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    # The number of loader processes is a choice (data.num_workers), and small data sets have few batches.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # A training without validation has an empty validation loader.
    warnings.filterwarnings("ignore", ".*Total length of `list` across ranks is zero.*")
    # Lightning's use of a class that torch is about to rename.
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    # That is what resuming means.
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    # Metrics are synchronised by torchmetrics, whose n the results record.
    warnings.filterwarnings("ignore", ".*recommended to use `self.log.*sync_dist=True`.*")
