"""Charts of the report: drawn by matplotlib as SVG that takes the page's colours.

matplotlib knows no style sheets, so it draws with placeholder colours, which are then replaced by
the page's variables: one drawing serves light and dark. Text stays text. Names that come from
users appear in the legend, which is HTML and escaped, and never in the drawing.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from hts_ray.metrics import mean_average_precision, wilson_interval
from hts_ray.report.content import ReliabilityBin, TrainingCurve
from hts_ray.report.formatting import count, figure, finite, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, SOFT, GRID, CARD, BAR, ACCENT = (f"#0{digit}0e0{digit}" for digit in "123456")
SERIES = tuple(f"#0{digit}0f0{digit}" for digit in "123456")
_VARIABLES = {
    INK: "--ink", SOFT: "--soft", GRID: "--line", CARD: "--card", BAR: "--bar", ACCENT: "--accent",
    **{color: f"--s{number}" for number, color in enumerate(SERIES)},
}  # fmt: skip
# Not everyone can tell lines apart by colour. Dashes and gaps in line widths.
_DASHES: tuple[tuple[float, ...], ...] = (
    (), (4, 1.6), (1.2, 1.4), (6, 1.4, 1.2, 1.4), (8, 2.4), (3, 1.2, 1, 1.2, 1, 1.2)
)  # fmt: skip
_MARKERS = "osD^vP"
_THEME: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 11.5, "text.color": INK,
    "axes.edgecolor": BAR, "axes.labelcolor": SOFT, "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8, "xtick.color": SOFT,
    "ytick.color": SOFT, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 6,
    "ytick.major.pad": 6, "figure.facecolor": "none",
    "lines.linewidth": 1.8, "lines.markersize": 4.5,
}  # fmt: skip
_SIZE = (5.4, 3.5)  # inches: about as many points as a telephone is wide in pixels
_MOST_POINTS_MARKED = 40
RECALLS = tuple(tenth / 10 for tenth in range(11))


@dataclass(frozen=True)
class Key:
    """A legend's entry: the series' number, its name and a note."""

    series: int
    name: str
    note: str = ""

    @property
    def dashes(self) -> str:
        """The line's pattern in SVG's notation for a line 2 wide; empty for a solid one."""
        return " ".join(f"{2 * part:g}" for part in _dashes(self.series))

    @property
    def color(self) -> int:
        """The number of the series' colour variable."""
        return self.series % len(SERIES)


@dataclass(frozen=True)
class Chart:
    """A drawing, what its lines mean, and its numbers for those who cannot see it."""

    svg: Markup
    title: str
    keys: Sequence[Key] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def draw(
    paint: Callable[[Figure], None], description: str, size: tuple[float, float] = _SIZE
) -> Markup:
    """Let `paint` draw on an empty figure and return it as SVG for the page.

    - A screen reader reads `description` in place of the drawing.
    - Colours other than this module's are the same in light and dark.
    - A group whose gid begins with `mark:` gets the rest as `data-mark`, for the page's scripts.
    - `data-plot` holds the place of the first axes in the view box.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    salt = hashlib.sha256(description.encode()).hexdigest()
    settings: Any = {**_THEME, "svg.hashsalt": salt}
    with mpl.rc_context():
        mpl.rcdefaults()  # a page must not depend on the user's own matplotlibrc
        mpl.rcParams.update(settings)
        drawing = Figure(figsize=size, layout="constrained")
        paint(drawing)
        sink = io.StringIO()
        drawing.savefig(sink, format="svg")
        box = drawing.axes[0].get_position() if drawing.axes else None
    width, height = (72 * side for side in size)
    plot = ""
    if box is not None:
        places = (box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height)
        plot = " ".join(f"{place:.2f}" for place in places)
    return _embedded(sink.getvalue(), description, (width, height), plot)


def _embedded(svg: str, description: str, size: tuple[float, float], plot: str) -> Markup:
    """Turn matplotlib's SVG file into a part of a page: no global ids, styles or colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = svg.replace("xlink:href", "href")
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))

    def keep(match: re.Match[str]) -> str:
        name = match[1]
        if name.startswith("mark:"):
            return f' data-mark="{name.removeprefix("mark:")}"'
        return match[0] if name in referred else ""

    svg = re.sub(r' id="([^"]*)"', keep, svg)
    # The page's own font, however this version of matplotlib writes its own.
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub("|".join(_VARIABLES), lambda match: f"var({_VARIABLES[match[0]]})", svg)
    opening = Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}" data-plot="{}">')
    head = opening.format(*size, description, plot)
    return head + Markup(re.sub(r"^<svg[^>]*>", "", svg).strip())  # noqa: S704 - our own drawing


def _dashes(number: int) -> tuple[float, ...]:
    """Return a series' pattern; series of one colour have different patterns."""
    return _DASHES[(number + number // len(SERIES)) % len(_DASHES)]


def _line(axes: Axes, number: int, x: Sequence[float], y: Sequence[float]) -> Line2D:
    (line,) = axes.plot(x, y, color=SERIES[number % len(SERIES)], clip_on=False)
    dashes = _dashes(number)
    line.set_linestyle((0, dashes) if dashes else "-")
    return line


def precision_recall_chart(
    by_method: Mapping[str, Mapping[int, Sequence[float]]], series: Mapping[str, int]
) -> Chart:
    """Draw each method's interpolated precision (11,) over recall, mean over its classes.

    `series` numbers the methods, so that one looks the same in all charts. A line carries its
    method's place in `by_method` as `data-mark`, so that the page can show a class instead.
    """
    curves = {
        name: [sum(points) / len(points) for points in zip(*by_class.values(), strict=True)]
        for name, by_class in by_method.items()
    }
    mean_ap = {
        name: mean_average_precision([sum(curve) / len(curve) for curve in by_class.values()])
        for name, by_class in by_method.items()
    }

    def paint(drawing: Figure) -> None:
        axes = drawing.subplots()
        for place, (name, precision) in enumerate(curves.items()):
            _line(axes, series[name], RECALLS, precision).set_gid(f"mark:{place}")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])

    ends = ", ".join(f"{name} {percent(mean_ap[name])} %" for name in curves)
    return Chart(
        draw(paint, f"Precision over recall, mean over the classes. Mean AP: {ends}."),
        "Interpolated precision over recall, mean over the classes",
        [Key(series[name], name, f"{percent(mean_ap[name])} %") for name in curves],
        ["Recall", *curves],
        [
            [f"{recall:.1f}", *(percent(curve[place]) for curve in curves.values())]
            for place, recall in enumerate(RECALLS)
        ],
    )


def reliability_chart(bins: Sequence[ReliabilityBin]) -> Chart:
    """Draw precision over probability with 95 % intervals, and how many labels each bin holds."""
    intervals = [wilson_interval(entry.right, entry.labels) for entry in bins]

    def paint(drawing: Figure) -> None:
        top, below = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=BAR, linestyle=(0, (3, 2)), linewidth=1.2)
        x = [entry.mean_probability for entry in bins]
        y = [entry.precision for entry in bins]
        lows, highs = zip(*intervals, strict=True)
        errors = np.maximum([np.subtract(y, lows), np.subtract(highs, y)], 0)
        top.errorbar(x, y, errors, color=ACCENT, marker="o", capsize=2.5, elinewidth=1.2)
        top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="precision")
        left, width = [entry.low for entry in bins], [entry.high - entry.low for entry in bins]
        heights = [entry.labels for entry in bins]
        below.bar(left, heights, [0.92 * w for w in width], align="edge", color=BAR)
        below.set(xlabel="probability given to the pseudo-label", ylabel="labels")
        below.locator_params(axis="y", nbins=3)

    rows = [
        [
            f"{percent(entry.low, 0)} to {percent(entry.high, 0)}",
            count(entry.labels),
            percent(entry.mean_probability),
            percent(entry.precision),
            " to ".join(map(percent, interval)),
        ]
        for entry, interval in zip(bins, intervals, strict=True)
    ]
    words = "; ".join(f"at {row[2]} % probability {row[3]} % of {row[1]} are right" for row in rows)
    return Chart(
        draw(paint, f"Reliability of the pseudo-labels: {words}.", (5.4, 4.2)),
        "Precision of pseudo-labels over their probability; the dashed line is perfect calibration",
        (),
        ["Probability, %", "Labels", "Mean, %", "Precision, %", "95 % interval"],
        rows,
    )


def training_charts(curves: Sequence[TrainingCurve], series: Mapping[str, int]) -> list[Chart]:
    """Draw loss, and validation mAP where it was measured, over the epochs of every student.

    `series` numbers the students, as in `precision_recall_chart`.
    """
    losses = {curve.name: curve.loss for curve in curves}
    quality = {curve.name: [100 * value for value in curve.validation_map] for curve in curves}
    charts = [
        epoch_chart(losses, series, "Mean training loss by epoch", "loss"),
        epoch_chart(quality, series, "mAP on the validation split by epoch, %", "mAP, %"),
    ]
    return [chart for chart in charts if chart is not None]


def epoch_chart(
    values: Mapping[str, Sequence[float]], series: Mapping[str, int], title: str, label: str
) -> Chart | None:
    """Draw one number of each student by epoch; None when none is finite."""
    points = {
        name: [(epoch, value) for epoch, value in enumerate(column, 1) if finite(value)]
        for name, column in values.items()
    }
    points = {name: found for name, found in points.items() if found}
    if not points:
        return None
    last = max(found[-1][0] for found in points.values())

    def paint(drawing: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = drawing.subplots()
        for name, found in points.items():
            line = _line(axes, series[name], *zip(*found, strict=True))
            if len(found) <= _MOST_POINTS_MARKED:
                line.set_marker(_MARKERS[series[name] % len(_MARKERS)])
        axes.set(xlabel="epoch", ylabel=label, xlim=(1, last) if last > 1 else (0.5, 1.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.margins(y=0.08)

    def at(name: str, epoch: int) -> str:
        column = values[name]
        return figure(column[epoch - 1]) if epoch <= len(column) else ""

    step = max(1, math.ceil(last / 200))
    ends = {name: f"ends at {figure(found[-1][1])}" for name, found in points.items()}
    return Chart(
        draw(paint, f"{title}: {'; '.join(f'{name} {end}' for name, end in ends.items())}."),
        title,
        [Key(series[name], name, end) for name, end in ends.items()],
        ["Epoch", *points],
        [[str(epoch), *(at(name, epoch) for name in points)] for epoch in range(1, last + 1, step)],
    )
