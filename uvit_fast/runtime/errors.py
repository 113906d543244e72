"""What a user can mend, as an exception."""


class UserError(ValueError):
    """Something the user can mend. The commands print its message on one line, without a traceback, and exit with 2."""


class RankError(UserError):
    """One that a single rank of a job may meet, which then has to say it itself; others meet every rank alike."""
