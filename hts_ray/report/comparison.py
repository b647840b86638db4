"""What methods gain over each other: the gap from zero-shot to supervised, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hts_ray.report.data import ClassRow, ComparisonRow, Role
from hts_ray.report.formatting import finite, percent, plural


def gap_closed(
    zero_shot: float | None, method: float | None, supervised: float | None
) -> float | None:
    """Return the share of the way from zero-shot to supervised that a method went.

    Below 0 when the method is worse than zero-shot, above 1 when it beats supervision; None
    when a number is missing or supervision is no better than zero-shot, so there is no gap.
    """
    if zero_shot is None or method is None or supervised is None:
        return None
    share = (method - zero_shot) / (supervised - zero_shot) if supervised > zero_shot else math.nan
    return share if math.isfinite(share) else None


def gap_sentence(rows: Sequence[ComparisonRow]) -> str:
    """Say in one sentence how much of the gap HTS closed; empty when that cannot be said."""
    roles = by_role(rows)
    zero, hts, supervised = (roles.get(role) for role in ("zero_shot", "hts", "supervised"))
    if zero is None or hts is None or not (finite(zero.mean_ap) and finite(hts.mean_ap)):
        return ""
    gain = f"{abs(hts.mean_ap - zero.mean_ap) * 100:.1f}"
    if float(gain) == 0:
        change = f"{hts.name} equals {zero.name} at {percent(zero.mean_ap)} % mAP"
    else:
        way = "above" if hts.mean_ap > zero.mean_ap else "below"
        change = f"{hts.name} reaches {percent(hts.mean_ap)} % mAP, {gain} points {way} {zero.name}"
    closed = hts.gap_closed
    if closed is None and supervised is not None:
        closed = gap_closed(zero.mean_ap, hts.mean_ap, supervised.mean_ap)
    if closed is None or supervised is None or not finite(supervised.mean_ap):
        return f"{change}."
    top = f"{supervised.name} ({percent(supervised.mean_ap)} %)"
    if closed < 0:
        return f"{change}: none of the gap to {top} is closed."
    return f"{change}: {closed * 100:.0f} % of the gap to {top} is closed."


def row_gap(row: ComparisonRow, rows: Sequence[ComparisonRow]) -> float | None:
    """Return the gap a row closed; None for the two rows that span the gap."""
    if row.gap_closed is not None:
        return row.gap_closed
    roles = by_role(rows)
    zero, supervised = roles.get("zero_shot"), roles.get("supervised")
    if zero is None or supervised is None or row is zero or row is supervised:
        return None
    return gap_closed(zero.mean_ap, row.mean_ap, supervised.mean_ap)


def by_role(rows: Sequence[ComparisonRow]) -> dict[Role, ComparisonRow]:
    """Return one row a role: the first that was given it, else the first whose name says so."""
    ordered = sorted(rows, key=lambda row: not row.role)
    return {row.role or _name_role(row.name): row for row in reversed(ordered)}


def method_of(role: Role, methods: Sequence[str], rows: Sequence[ComparisonRow]) -> str | None:
    """Return the method that plays a role: as the comparison says, else by its name."""
    row = by_role(rows).get(role)
    if row is not None and row.name in methods:
        return row.name
    return next((name for name in methods if _name_role(name) == role), None)


def wins_sentence(rows: Sequence[ClassRow], zero: str | None, hts: str | None) -> str:
    """Count the classes where HTS is above zero-shot, so that a mean is not all there is."""
    if zero is None or hts is None:
        return ""
    pairs = [(row.ap.get(zero), row.ap.get(hts)) for row in rows]
    both = [(a, b) for a, b in pairs if finite(a) and finite(b)]
    if not both:
        return ""
    better, worse = sum(b > a for a, b in both), sum(b < a for a, b in both)
    return (
        f"Against {zero}, {hts} has a higher AP in {better} of {len(both)}"
        f" {plural('class', len(both))} and a lower one in {worse}."
    )


def _name_role(name: str) -> Role:
    start = name.casefold().replace("_", "-").replace(" ", "-")
    prefixes: tuple[tuple[str, Role], ...] = (
        ("zero-shot", "zero_shot"),
        ("hts", "hts"),
        ("supervised", "supervised"),
    )
    return next((role for prefix, role in prefixes if start.startswith(prefix)), "")
