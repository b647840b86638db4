"""Agreement with people in the report: overall, by class, and the images that differ most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hts_ray.images.thumbnail import stored_thumbnail
from hts_ray.report.content import Section, Verdict
from hts_ray.report.page import environment
from hts_ray.review.agreement import AGREEMENT, TABLE
from hts_ray.store import storage
from hts_ray.store.run import find_stage, finished_stages

Entry = Mapping[str, Any]

MAX_IMAGES = 24
_TEMPLATES = Path(__file__).parent
_THUMBNAIL = (360, 12_000)  # pixels of a side, bytes
# What the page calls a label that people changed, by what the machine had said.
_VERDICTS: dict[str, Verdict] = {"positive": "wrong", "negative": "missed", "ignored": "ignored"}


def review_sections(run_dir: str) -> list[Section]:
    """Return the report's section about a run's latest `hts review`; none without one."""
    stages = [
        stage
        for stage in finished_stages(run_dir, TABLE)
        if storage.exists(stage.file(AGREEMENT))  # another folder may be called review-something
    ]
    if not stages:
        return []
    history = [storage.read_json(stage.file(AGREEMENT)) for stage in stages]
    found, latest = history[-1], find_stage(run_dir, "pseudo_labels")
    labels = None if latest is None else f"{latest.table}-{latest.key}"
    images = disagreed_images(found["disagreements"])
    html = environment(_TEMPLATES).get_template("review.html.j2").render(
        found=found,
        rows=_class_rows(found),
        file=stages[-1].file(AGREEMENT),
        images=[(stored_thumbnail(of[0]["uri"] or "", *_THUMBNAIL), of)
                for of in images[:MAX_IMAGES]],
        verdicts=_VERDICTS,
        differing=len(images),
        history=history if len(history) > 1 else [],
        newer=None if labels == found["pseudo_labels"] else labels,
    )  # fmt: skip
    return [Section("review", "Agreement with people", Markup(html))]  # noqa: S704 - escaped there


def disagreed_images(disagreements: Iterable[Entry]) -> list[list[Entry]]:
    """Return the disagreements of each image that has some, the worst image first.

    Wrong and missed labels come before those that the machine left undecided: only they teach
    the student something wrong.
    """
    images: dict[str, list[Entry]] = defaultdict(list)
    for entry in disagreements:
        images[entry["image_id"]].append(entry)
    return sorted(images.values(), key=_badness, reverse=True)


def _badness(entries: list[Entry]) -> tuple[int, int, float]:
    mistakes = sum(entry["machine"] != "ignored" for entry in entries)
    return mistakes, len(entries), max(entry["probability"] or 0.0 for entry in entries)


def _class_rows(found: Entry) -> list[Entry]:
    """Return the figures of all classes together, then by class, most mistakes first."""
    by_class = sorted(
        found["per_class"], key=lambda row: (-(row["wrong"] + row["missed"]), row["name"])
    )
    return [{**found["overall"], "name": "all classes"}, *by_class]
