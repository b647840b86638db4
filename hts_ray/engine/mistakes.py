"""Mistakes of the user that a worker finds, without Ray's wrapping."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hts_ray import errors
from hts_ray.errors import UserError


@contextmanager
def users_mistakes_unwrapped() -> Iterator[None]:
    """Raise the UserError inside Ray's wrapping; other errors pass."""
    try:
        yield
    except Exception as error:
        mistake = user_error(error)
        if mistake is None or mistake is error:
            raise
        # Without the cause: Ray's wrappers print the worker's traceback.
        raise mistake from None


_NAMED_IN_TEXT = re.compile(r"^hts_ray\.errors\.(ConfigError|DataError|UserError): (.+)", re.M)


def user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError inside a chain of Ray's wrappers, or None.

    Of an actor that died while it was made Ray keeps the traceback's text alone, whose last
    line names the error.
    """
    named = _NAMED_IN_TEXT.findall(str(error)) if error is not None else []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # A RayTaskError is made to be an instance of its cause's class as well: look inside.
        inner = getattr(error, "cause", None)
        if isinstance(error, UserError) and not isinstance(inner, BaseException):
            return error
        error = inner if isinstance(inner, BaseException) else error.__cause__
    if named:
        kind, message = named[-1]
        return getattr(errors, kind)(message)  # type: ignore[no-any-return]
    return None
