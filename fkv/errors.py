"""The one exception that is the user's to fix."""


class UserError(Exception):
    """Bad input: one line that names the file, field or value and says what to do about it."""
