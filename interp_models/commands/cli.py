"""What the two scripts share: arguments, `--help`, and one clear line for bad input."""

import contextlib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

from interp_models.config.describe import describe
from interp_models.core.errors import InputError
from interp_models.core.files import unwritable
from interp_models.core.registry import Registry
from interp_models.core.schema import schema_of
from interp_models.core.stopping import Stopped, end_with_parent, how_to_go_on, stop_of, stoppable
from interp_models.core.written import expanded
from interp_models.data.base import DATASETS
from interp_models.data.module import DataModule
from interp_models.explainers.base import EXPLAINERS
from interp_models.metrics.base import METRICS
from interp_models.metrics.prototype_base import PROTOTYPE_METRICS
from interp_models.training.module import MODELS


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


REPOSITORY = Path(__file__).parents[2]


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
    parts.append("\nphases[i].on_end")
    parts += [f"  of {name}: {', '.join(MODELS.get(name).actions)}" for name in MODELS.names()]
    keys = ", ".join(key for name in METRICS.names() for key in METRICS.get(name).keys)
    return "\n".join([*parts, f"\nmetrics: {keys}", f"\nprototype_metrics: {', '.join(PROTOTYPE_METRICS.names())}"])
