"""The one exception for everything that a user can get wrong."""


class UserError(Exception):
    """A mistake of the user, told in one line: the value, what is allowed, and the mend.

    Launch scripts print it without a traceback and exit with code 2.
    """


class TooFewRows(UserError):
    """There are fewer rows than a map or a batch needs."""
