"""The error for bad input, its one kind that an evaluation outlives, and the line that stands for another's error."""


class InputError(ValueError):
    """Input that a user can mend: one line saying what, where, and what was expected.

    The scripts print it as one line and exit with a code other than 0; from Python it is a `ValueError`.
    """


class NotApplicable(InputError):
    """A method that does not apply to a model, or to a data set: an evaluation goes on without it, and says why."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty; the name of its type, if it has none."""
    name = type(error).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and isinstance(error, KeyError):
        return f"{name}: {lines[0]}"  # its text is the key alone
    return lines[0] if lines else name
