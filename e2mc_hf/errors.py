"""The one exception that means: the input is at fault, not the program."""


class UsageError(ValueError):
    """An option, a dataset or a checkpoint given by the user breaks a rule.

    Scripts print the message as one line and exit with code 2; nothing has been written by then.
    """
