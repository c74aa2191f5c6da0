"""Errors for bad input, and one-line texts of other errors."""

import difflib
import typing


class InputError(ValueError):
    """Input that a user can mend: one line saying what, where, and what was expected.

    The scripts print it as one line and exit with a code other than 0; from Python it is a `ValueError`.
    """


class NotApplicable(InputError):
    """A method does not apply to a model or a data set. An evaluation skips it and reports why."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty; the name of its type, if it has none."""
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and isinstance(error, KeyError):
        return f"{name}: {lines[0]}"  # its text is the key alone
    return lines[0] if lines else name


def unknown(kind: str, name: object, known: typing.Iterable[str]) -> InputError:
    """An error for a name that does not exist, with the nearest ones that do.

    Spellings count as one name: `GradCAM++`, `Grad-CAM-pp` and `gradcam_pp`.
    """
    names = sorted(known)
    by_letters: dict[str, list[str]] = {}
    for one in names:
        by_letters.setdefault(_letters(one), []).append(one)
    near = difflib.get_close_matches(_letters(str(name)), by_letters, n=3)
    same = by_letters.get(_letters(str(name)), [])
    close = same or [one for letters in near for one in by_letters[letters]]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(names)}"
    return InputError(f"unknown {kind} {name!r}; {hint}")


def _letters(name: str) -> str:
    """The letters and digits of a name, small."""
    return "".join(x for x in name.lower().replace("plusplus", "pp").replace("++", "pp") if x.isalnum())


Misfit = tuple[str, object, typing.Sequence[str]]
"""A name that does not exist: its kind, the name, and those that do."""


def unfit(found: typing.Sequence[Misfit]) -> InputError:
    """One error for all names that do not exist."""
    if len(found) == 1:
        return unknown(*found[0])
    parts = []
    for kind, known in dict.fromkeys((kind, tuple(known)) for kind, _, known in found):
        names = [repr(name) for other, name, those in found if (other, tuple(those)) == (kind, known)]
        shown = [name for name in sorted(known) if len(known) <= 30 or "." not in name]  # not all modules of a trunk
        parts.append(f"unknown {kind} {', '.join(names)} (known: {', '.join(shown) or 'none'})")
    return InputError("; ".join(parts))
