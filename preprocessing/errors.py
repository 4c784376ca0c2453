"""The one error that a user, not a bug, causes."""


class InputError(ValueError):
    """Wrong input, option or environment: the message says what was found, where, and what to do.

    The command line prints it as one sentence and exits non-zero; anything else is a bug and
    keeps its traceback.
    """


def as_typed(name: str) -> str:
    """Return the command-line option of that name: `--max-length` for `max_length`."""
    return f"--{name.replace('_', '-')}"


class OtherRankError(InputError):
    """This rank is sound; another one met an error that ends all, and reports it."""
