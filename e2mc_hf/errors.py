"""The one exception that means: the input is at fault, not the program."""


class UsageError(ValueError):
    """An option, a dataset or a checkpoint given by the user breaks a rule.

    Scripts print the message as one line and exit with code 2. All but a broken image met on the way is found before
    anything is written.
    """
