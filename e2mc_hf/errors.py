"""Exceptions that are no bug: the input is at fault, or a training went wrong."""


class UsageError(ValueError):
    """An option, a dataset or a checkpoint given by the user breaks a rule.

    Scripts print the message as one line and exit with code 2. All but a broken image met on the way is found before
    anything is written.
    """


class NonFiniteError(FloatingPointError):
    """A training met NaN or infinity, and stopped before it was used.

    Scripts print the message as one line and exit with code 1.
    """


class CollapseError(RuntimeError):
    """The embeddings of a training collapsed, and it was to stop then.

    Scripts print the message as one line and exit with code 1.
    """
