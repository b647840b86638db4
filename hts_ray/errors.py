"""Errors that a user can fix; the command line prints their message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user or a condition outside the program; the message says what to do."""

    exit_code = 1


class DataError(UserError):
    """Input data that cannot be used, or a run that produced nothing."""


class NoLabelsError(DataError):
    """A filter that left no label at all."""


class ConfigError(UserError):
    """A setting or a command-line argument that is wrong.

    `field` names the setting, `value` is what was given and `remedy` says what to write
    instead; a single positional message may be given in their place.
    """

    exit_code = 2

    def __init__(
        self, message: str = "", *, field: str = "", value: object = None, remedy: str = ""
    ) -> None:
        if field:
            head = f"{field} = {value!r}" if value is not None else field
            message = ": ".join(part for part in (head, message, remedy) if part)
        super().__init__(message)
        self.field = field
