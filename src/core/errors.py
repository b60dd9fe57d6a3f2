"""A user mistake, shown without a traceback."""


class UserError(Exception):
    """Says what came, what was expected and what to type instead. Programs print it and exit with status 1."""
