"""The one error for bad input."""


class InputError(ValueError):
    """Input that a user can mend: one line saying what, where, and what was expected.

    The scripts print it as one line and exit with a code other than 0; from Python it is a `ValueError`.
    """
