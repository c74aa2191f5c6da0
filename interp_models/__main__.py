"""`python -m interp_models train ...` and `python -m interp_models evaluate ...`."""

import sys
from collections.abc import Sequence

from interp_models import __doc__ as about
from interp_models import __version__
from interp_models.commands import evaluate, train
from interp_models.core.errors import unknown

COMMANDS = {"train": train.script, "evaluate": evaluate.script}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name](rest)
    if name == "--version":
        print(__version__)
        return 0
    if name in ("-h", "--help"):
        print(usage())
        return 0
    print(f"error: {unknown('command', name, [*COMMANDS, '--version', '--help'])}", file=sys.stderr)
    return 2


def usage() -> str:
    """The usage: all commands, each with the first line of its help."""
    lines = [(about or "").partition("\n")[0], ""]
    for name, module in (("train", train), ("evaluate", evaluate)):
        first = (module.__doc__ or "").partition("\n")[0]
        lines.append(f"python -m interp_models {f'{name} --help':16}  {first}")
    lines.append("python -m interp_models --version")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
