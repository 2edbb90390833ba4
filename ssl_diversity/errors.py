"""The two ways a task ends early that are not bugs."""


class UserError(Exception):
    """A mistake in what the user asked for: one line that says what is wrong, where, and what to do.

    The command line prints it without a stack trace and exits with status 2.
    """


class Interrupted(Exception):
    """Work stopped on request (a signal, a lost claim) after saving what it needs to go on exactly."""
