"""A sweep in the report: every trial over all settings, and the objective over each of them.

Plain SVG in the report's own colours. Values are placed in 0..1 along an axis: numbers between
their bounds (evenly in the logarithm where the sweep drew them so), choices one beside the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hts_ray.store import storage
from hts_ray.store.run import find_stage
from hts_ray.store.tables import read_table
from hts_ray.sweep.log import OWN
from hts_ray.sweep.plan import TABLE
from hts_ray.sweep.space import Parameter, shown
from hts_ray.sweep.stage import FINALISTS_FILE, TRIALS_FILE

Row = dict[str, Any]

_TEMPLATE = Path(__file__).with_name("sweep.html.j2")
TOP_SHARE = 0.1  # of the complete trials are drawn as the best
# Drawn in this order, so that what matters lies on top; each is a class of the style sheet.
_LAYERS = ("stopped", "complete", "top", "own", "best")


class Axis(Parameter):
    """A setting's scale: its choices in their order, or numbers from `low` to `high`."""

    @property
    def short(self) -> str:
        """The setting's name without its section."""
        return self.name.rpartition(".")[2]

    def place(self, value: Any) -> float | None:
        """Return where a value lies, 0..1; None for one that the axis does not have.

        The run's own value may lie outside of what was tried; numbers then go to the nearer end.
        """
        if self.choices is not None:
            if value not in self.choices:
                return None
            return (self.choices.index(value) + 0.5) / len(self.choices)
        if value is None:
            return None
        low, high, at = self.low, self.high, float(value)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(at, 1e-300))
        return min(max((at - low) / (high - low), 0.0), 1.0) if high > low else 0.5

    def spread(self, row: Row) -> float | None:
        """Return where a trial's dot lies; equal choices side by side, or they would hide."""
        at = self.place(row[self.name])
        if at is None or self.choices is None:
            return at
        return at + (int(row["trial"]) * 0.618 % 1 - 0.5) * 0.6 / len(self.choices)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the places that are named, with their names."""
        if self.choices is not None:
            count = len(self.choices)
            return [((at + 0.5) / count, shown(value)) for at, value in enumerate(self.choices)]
        return [(0.0, f"{self.low:.3g}"), (1.0, f"{self.high:.3g}")]


def sweep_section(run_dir: str) -> Markup:
    """Return the report's section about a run's latest sweep; empty without one."""
    stage = find_stage(run_dir, TABLE)
    if stage is None:
        return Markup()
    stats = stage.stats
    return render_sweep(
        read_table(stage.file(TRIALS_FILE)).to_pylist(),
        [Axis(*stored) for stored in stats["space"]],
        stats,
        storage.read_json(stage.file(FINALISTS_FILE)),
    )


def render_sweep(
    rows: Sequence[Row],
    axes: Sequence[Axis],
    stats: Mapping[str, Any],
    finalists: Sequence[Mapping[str, Any]],
) -> Markup:
    """Return the section: the verdict, the finalists and both kinds of plots.

    `rows` are the rows of `trials`, `stats` those of the stage.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    drawn = [row for row in rows if row["objective"] is not None]
    values = [row["objective"] for row in drawn] or [0.0]
    text = template.render(
        stats=stats,
        finalists=finalists,
        own=OWN,
        axes=axes,
        objective=Axis("objective", min(values), max(values)),
        layers=_layers(drawn, int(stats["best_trial"])),
    )
    return Markup(text)  # noqa: S704 - rendered by a template that escapes what it is given


def _layers(rows: Sequence[Row], best: int) -> dict[str, list[Row]]:
    """Return the trials of each layer, in the order in which the layers are drawn."""
    complete = sorted(
        (row for row in rows if row["status"] == "complete"), key=lambda row: -row["objective"]
    )
    top = {row["trial"] for row in complete[: max(1, round(TOP_SHARE * len(complete)))]}
    layers: dict[str, list[Row]] = {name: [] for name in _LAYERS}
    for row in rows:
        layer = "complete" if row["status"] == "complete" else "stopped"
        layer = "top" if row["trial"] in top else layer
        layer = "own" if row["trial"] == OWN else layer
        layers["best" if row["trial"] == best else layer].append(row)
    return layers
