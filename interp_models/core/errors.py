"""Errors for bad input, and one-line messages for other errors."""

import difflib
import typing


class InputError(ValueError):
    """An error in the input, which the user can correct. Its message is one line: what, where, and what was expected.

    The commands print the message and exit with code 2. In Python it is a `ValueError`.
    """


class NotApplicable(InputError):
    """A method does not apply to a model or a data set. An evaluation leaves the method out and reports the reason."""


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, or the name of its type if the text is empty."""
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and isinstance(error, KeyError):
        return f"{name}: {lines[0]}"  # the text of a KeyError is only the key
    return lines[0] if lines else name


def unknown(kind: str, name: object, known: typing.Iterable[str]) -> InputError:
    """Make an error for an unknown name, with the nearest known names.

    Different spellings count as the same name: `GradCAM++`, `Grad-CAM-pp` and `gradcam_pp`.

    Args:
        kind: kind of name, such as `explainer`.
        name: the unknown name.
        known: all known names.
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
    """The letters and digits of a name in lower case."""
    return "".join(x for x in name.lower().replace("plusplus", "pp").replace("++", "pp") if x.isalnum())


Misfit = tuple[str, object, typing.Sequence[str]]
"""An unknown name: its kind, the name, and the known names."""


def unfit(found: typing.Sequence[Misfit]) -> InputError:
    """Make one error for several unknown names."""
    if len(found) == 1:
        return unknown(*found[0])
    parts = []
    for kind, known in dict.fromkeys((kind, tuple(known)) for kind, _, known in found):
        names = [repr(name) for other, name, those in found if (other, tuple(those)) == (kind, known)]
        shown = [name for name in sorted(known) if len(known) <= 30 or "." not in name]  # no modules of a backbone
        parts.append(f"unknown {kind} {', '.join(names)} (known: {', '.join(shown) or 'none'})")
    return InputError("; ".join(parts))
