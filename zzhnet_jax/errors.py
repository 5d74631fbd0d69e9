"""Errors that a user can put right.

The command line prints any `UserError` as one line, without a traceback, and exits with code 2; so
each message names the file, field or value at fault and the remedy.
"""


class UserError(Exception):
    """Base of everything that is wrong with the input rather than with the program."""


class ConfigError(UserError, ValueError):
    """A configuration field has a value that it cannot have."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        """Says which field, what it was given and what it takes.

        Args:
          field: the field's path as the user wrote it, for example `model.depths`.
          value: what was given.
          allowed: what is allowed, as a phrase that completes "it must be ...".
        """
        super().__init__(f"{field} = {value!r}: it must be {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


class DataError(UserError):
    """An image, label or list file is missing, unreadable or inconsistent."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, written, or does not belong to this network."""


class ConversionError(UserError):
    """A PyTorch checkpoint cannot be converted faithfully."""
