"""The command lines of the two commands, for messages."""

import shlex
import sys
from pathlib import Path


def command(name: str) -> str:
    """The command `train` or `evaluate`, in the form in which the user called this process.

    The forms are the script of a clone, the installed command (`interp-train`), and `python -m interp_models`, which
    always works.
    """
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name in ("train.py", "evaluate.py"):
        return f"python {shlex.quote(str(called.with_name(f'{name}.py')))}"
    if called.stem in ("interp-train", "interp-evaluate"):
        return f"interp-{name}"
    return f"python -m interp_models {name}"


def as_called(text: str) -> str:
    """Replace `python train.py` and `python evaluate.py` in a text by the commands as the user called them."""
    for name in ("train", "evaluate"):
        text = text.replace(f"python {name}.py", command(name))
    return text
