"""A report as one HTML document that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hts_ray.report import formatting
from hts_ray.report.charts import precision_recall_chart, reliability_chart, training_charts
from hts_ray.report.content import VERDICTS, Confusion, FunnelStep, ReportData
from hts_ray.report.gallery import gallery_classes, gallery_data
from hts_ray.report.label_quality import expected_calibration_error
from hts_ray.report.results import by_role, gap_sentence, row_gap, wins_sentence
from hts_ray.store import storage

TEMPLATES = Path(__file__).parent / "templates"
MAX_QUARANTINE_ROWS = 200
MAX_CONFUSED_PAIRS = 12
OPEN_CONFUSIONS = 1  # tables that are unfolded from the start

Curves = Mapping[str, Mapping[int, Sequence[float]]]


def render_report(data: ReportData) -> str:
    """Return the report as one HTML document that needs no other file and no network."""
    script, style = packaged("report.js"), packaged("palette.css", "report.css")
    roles = by_role(data.comparison)
    zero, hts = (roles[role].name if role in roles else None for role in ("zero_shot", "hts"))
    series, curves = _series(data), data.precision_recall
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            script=script,
            style=style,
            script_hash=content_security_hash(script),
            comparison=[
                (row, row is roles.get("hts"), row_gap(row, data.comparison))
                for row in data.comparison
            ],
            gap_sentence=gap_sentence(data.comparison),
            wins_sentence=wins_sentence(data.per_class, zero, hts),
            funnel=_funnel_view(data.funnel),
            methods=[
                (name, name == hts)
                for name in dict.fromkeys(name for row in data.per_class for name in row.ap)
            ],
            precision_recall=precision_recall_chart(curves, series) if curves else None,
            curve_data=_curve_data(curves),
            curve_classes=_curve_classes(data),
            reliability=reliability_chart(data.reliability) if data.reliability else None,
            calibration_error=expected_calibration_error(data.reliability),
            confused_pairs=_confused_pairs(data.confusions),
            open_confusions=OPEN_CONFUSIONS,
            training=training_charts(data.training, series),
            seconds=sum(row.seconds or 0.0 for row in data.stages),
            gpu_hours=sum(row.gpu_hours or 0.0 for row in data.stages),
            kinds=Counter(row["error_kind"] for row in data.quarantine).most_common(),
            max_quarantine=MAX_QUARANTINE_ROWS,
            provenance=list(formatting.flat(data.provenance)),
            verdicts=VERDICTS,
            shown_verdicts={label.verdict for item in data.gallery for label in item.labels},
            gallery_classes=gallery_classes(data.gallery),
            gallery_data=gallery_data(data.gallery),
        )
    )


def write_report(path: str, data: ReportData) -> None:
    """Render a report and write it to a path or URI in one step."""
    storage.write_bytes(path, render_report(data).encode("utf-8"))


def packaged(*names: str) -> Markup:
    """Return style sheets or scripts of the package, one after the other, as they are."""
    texts = [(TEMPLATES / name).read_text(encoding="utf-8") for name in names]
    return Markup("".join(texts))  # noqa: S704 - packaged


def content_security_hash(script: str) -> str:
    """Return by what a page's Content-Security-Policy knows its one script: base64 of SHA-256."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def environment(folder: Path = TEMPLATES) -> Environment:
    """Return the templates of a folder; they escape every value and have the page's filters."""
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        percent=formatting.percent,
        count=formatting.count,
        seconds=formatting.seconds,
        figure=formatting.figure,
        width=formatting.width,
        plural=lambda number, word: formatting.plural(word, number),
    )
    return made


def _series(data: ReportData) -> dict[str, int]:
    """Number the methods, so that each looks the same in all charts."""
    names = [row.name for row in data.comparison]
    names += [*data.precision_recall, *(curve.name for curve in data.training)]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _funnel_view(steps: Sequence[FunnelStep]) -> list[tuple[FunnelStep, float | None, str]]:
    """Each step with its share of the step it refers to (None above 1) and that in words."""
    counts = {step.name: step.count for step in steps}
    view: list[tuple[FunnelStep, float | None, str]] = []
    for step in steps:
        whole = counts.get(step.of, 0)
        if not whole:
            view.append((step, None, ""))
        elif step.count <= whole:
            part = step.count / whole
            view.append((step, part, f"{formatting.share(part)} of {step.of}"))
        else:
            view.append((step, None, f"{step.count / whole:,.1f} \u00d7 {step.of}"))
    return view


def _curve_data(curves: Curves) -> dict[str, list[list[int] | None]]:
    """Return, by class id, each method's curve in thousandths: what the page's script draws."""
    ids = dict.fromkeys(class_id for by_class in curves.values() for class_id in by_class)
    return {
        str(class_id): [
            [round(1000 * value) for value in by_class[class_id]] if class_id in by_class else None
            for by_class in curves.values()
        ]
        for class_id in ids
    }


def _curve_classes(data: ReportData) -> list[tuple[int, str]]:
    known = {class_id for by_class in data.precision_recall.values() for class_id in by_class}
    named = [(row.class_id, row.name) for row in data.per_class if row.class_id in known]
    return sorted(named, key=lambda entry: entry[1].casefold())


def _confused_pairs(confusions: Sequence[Confusion]) -> list[tuple[str, str, int]]:
    """Return (annotated class, labeled class, images) of the most frequent mistakes."""
    pairs = [pair for table in confusions for pair in table.pairs() if pair[0] in table.names]
    return sorted(pairs, key=lambda pair: -pair[2])[:MAX_CONFUSED_PAIRS]
