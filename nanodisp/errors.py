"""The error that a user can mend."""


class UserError(Exception):
    """A mistake of the user's, told in one line: what was wrong, what is allowed, what to do.

    The entry points print it without a traceback; anything else is a bug of ours and shows one.
    """
