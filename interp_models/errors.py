"""The error for bad input, and its one kind that an evaluation outlives."""


class InputError(ValueError):
    """Input that a user can mend: one line saying what, where, and what was expected.

    The scripts print it as one line and exit with a code other than 0; from Python it is a `ValueError`.
    """


class NotApplicable(InputError):
    """A method that does not apply to a model, or to a data set: an evaluation goes on without it, and says why."""
