"""Numbers as text for readers; a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from hts_ray.engine.console import duration

NOTHING = "\u2013"


def finite(value: float | None) -> TypeGuard[float]:
    """Return whether there is a number."""
    return value is not None and math.isfinite(value)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as percent, without the sign."""
    if not finite(value):
        return NOTHING
    text = f"{value * 100:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def count(value: int | None) -> str:
    """Return an integer with separators."""
    return NOTHING if value is None else f"{value:,}"


def figure(value: float | None) -> str:
    """Return a number with about three significant digits: 0.0123, 1.23, 12.3, 1,230."""
    if not finite(value):
        return NOTHING
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def share(part: float) -> str:
    """Return a fraction as percent; only 0 and 1 are shown as 0.0 % and 100.0 %."""
    if 0 < part < 0.001:
        return "under 0.1 %"
    if 0.999 < part < 1:
        return "over 99.9 %"
    return f"{part * 100:.1f} %"


def width(value: float | None) -> str:
    """Return a bar's width in percent, kept inside its track."""
    return f"{min(max(value, 0.0), 1.0) * 100:.1f}" if finite(value) else "0"


def seconds(value: float | None) -> str:
    """Return a duration in words."""
    if not finite(value):
        return NOTHING
    return f"{value:.1f} s" if value < 9.95 else duration(value)


def plural(word: str, number: int) -> str:
    """Return an English noun in the singular or the plural."""
    return word if number == 1 else word + ("es" if word.endswith("s") else "s")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield (dotted name, text) of nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value is None or value in ("", [], ()):
            yield f"{prefix}{key}", NOTHING
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(str(entry) for entry in value)
        else:
            yield f"{prefix}{key}", str(value)
