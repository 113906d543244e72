"""Errors that a user can correct."""


class UserError(ValueError):
    """An error that the user can correct: commands print its message on one line and exit with code 2."""


class RankError(UserError):
    """A UserError that may occur on a single rank of a job, which then reports it; others occur on all."""
