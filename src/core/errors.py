"""The one exception meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake that the user can mend: what came, what was expected, what to type instead.

    Entry points print it without a traceback and exit with status 1.
    """

    reported = False
    """Whether it has been shown already."""
