"""Shared parts of the commands: arguments, `--help`, and one-line errors.

The modules of this room import no slow library, so that the answer to a typo comes at once.
"""

import contextlib
import errno
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from interp_models.commands.help import help_text
from interp_models.config.shipped import shipped_names
from interp_models.core.command import as_called
from interp_models.core.errors import InputError
from interp_models.core.files import unwritable
from interp_models.core.plugins import located
from interp_models.core.stopping import Stopped, end_with_parent, how_to_go_on, stop_of, stoppable
from interp_models.core.written import given, values


def run_script(
    usage: str | None,
    schema: type,
    run: Callable[[list[str], list[str]], object],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a command.

    Bad input ends in one line on stderr and exit code 2, without a traceback. A signal ends in one line that says how
    to go on, and exit code 128 + its number.

    Args:
        usage: text of the usage; it names the options that begin with dashes.
        schema: the dataclass of the config, for `--help`.
        run: function of the arguments without `=`, and of the overrides `key=value`.
        arguments: the arguments of the command line; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end_with_parent()
    try:
        with stoppable():
            if any(argument in ("-h", "--help") for argument in arguments):
                topics = [one for one in arguments if "=" not in one and not one.startswith("-")]
                print(help_text(as_called(usage or ""), schema, topics, plugins_of(arguments)))
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
        if (line := unwritable(error) or too_long(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def too_long(error: BaseException) -> str | None:
    """A one-line message for a file name that the system refuses because of its length; None for other errors."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"file name {str(error.filename)[:60]!r}... is too long: {len(str(error.filename))} characters"
    return None


def separated(arguments: Sequence[str], options: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Separate arguments without `=` from overrides; raises `InputError` for an unknown option."""
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
            none = f"{key}=null means none"
            raise InputError(f"{argument!r} has no value; write key=value, without spaces around =; {none}")
        if argument.startswith("-") and not sign and argument not in options:
            known = f" or {', '.join(options)}" if options else ""
            raise InputError(f"unknown option {argument}; options are written key=value, see --help{known}")
    # Path.exists raises an error for a name that is too long, such as a long list of explainers
    named = [argument for argument in arguments if "=" not in argument or os.path.exists(argument)]
    return named, [argument for argument in arguments if argument not in named]


def stopped(stop: Stopped) -> int:
    """Print how to go on after a signal; returns the exit code.

    Only rank 0 prints. Other ranks return 0, because Lightning kills rank 0 if another rank ends with another code.
    """
    if _rank():
        return 0
    with contextlib.suppress(OSError):  # the terminal may be gone
        if sys.stderr.isatty():  # a progress bar may be on the line
            print(file=sys.stderr)
        print(f"stopped by {stop}; {how_to_go_on()}", file=sys.stderr)
    return 128 + stop.number


def _rank() -> int:
    """The rank of this process. It imports nothing slow, so that a stop is quick."""
    if "pytorch_lightning" not in sys.modules:
        return int(os.environ.get("LOCAL_RANK", "0"))
    from pytorch_lightning.utilities import rank_zero_only

    return int(rank_zero_only.rank)  # type: ignore[attr-defined]


def output_is_gone() -> bool:
    """Whether stdout is closed, as after `| head`; if so, the remaining output is dropped."""
    out = sys.stdout.fileno()
    poll = select.poll()
    poll.register(out, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return gone


def taken(overrides: Sequence[str], key: str) -> tuple[str | None, list[str]]:
    """Take out the override of `key`, which is not a key of the config; returns its value and the other overrides."""
    found = [override for override in overrides if override.startswith(f"{key}=")]
    if len(found) > 1:
        raise InputError(f"{key}= is given twice: {' '.join(found)}")
    value = found[0].partition("=")[2] if found else None
    return value, [override for override in overrides if override not in found]


def plugins_of(overrides: Sequence[str]) -> list[str]:
    """The plugins of a `plugins=` override; relative paths start at the working folder."""
    value, _ = taken(overrides, "plugins")
    named = [] if value is None else values(given(value))
    return located([str(one) for one in (named if isinstance(named, list) else [named])], Path())


EVALUATIONS = ("eval", "paper")
"""Folders of configs that are no trainings."""


def list_configs(positional: Sequence[str], overrides: Sequence[str], *, evaluations: bool) -> None:
    """Print the names of the shipped configs with their first comments.

    Args:
        positional: arguments of the command; only `--list` is accepted.
        overrides: overrides of the command; none is accepted.
        evaluations: whether to list the configs of evaluations and of papers' tables, or all others.
    """
    if len(positional) > 1 or overrides:
        raise InputError(f"--list takes nothing else; got {' '.join([*positional, *overrides])}")
    found = shipped_names()
    names = [name for name in found if (name.partition("/")[0] in EVALUATIONS) == evaluations]
    width = max(map(len, names))
    print("\n".join(f"{name:{width}}  {as_called(found[name])}" for name in names))


def one_line(error: BaseException) -> str:
    """The message of an error as one line. In an error from a loader process, a traceback comes before the message."""
    line = str(error).strip().splitlines()[-1]
    return line.removeprefix(f"{InputError.__module__}.").removeprefix("InputError: ")
