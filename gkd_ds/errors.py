"""The one exception for wrong input."""


class InputError(ValueError):
    """Something the user gave is wrong.

    The message is one sentence that says what is wrong and what to change. The command line prints it on
    stderr and exits with code 2; library users catch it as a ValueError. Raised before anything is allocated,
    and equally on every rank.
    """
