"""Agreement with people in the report: overall, by class, and the images that differ most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from hts_ray.images.thumbnail import stored_thumbnail
from hts_ray.report.content import Section, Verdict
from hts_ray.report.page import environment
from hts_ray.review.agreement import Machine
from hts_ray.review.measuring import AGREEMENT, TABLE
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage, finished_stages

Content = Mapping[str, Any]

MAX_IMAGES = 24
_TEMPLATES = Path(__file__).parent
_THUMBNAIL = (360, 12_000)  # pixels of a side, bytes
# What the page calls a label that people changed, by what the machine had said.
_VERDICTS: dict[Machine, Verdict] = {
    "positive": "wrong", "negative": "missed", "ignored": "ignored"
}  # fmt: skip


@dataclass(frozen=True)
class DisagreedLabel:
    """A label that people changed; `probability` is the machine's, where it was positive."""

    verdict: Verdict
    name: str
    probability: float | None


@dataclass(frozen=True)
class DisagreedImage:
    """An image whose labels people changed; `picture` is a data URI, None if it is gone."""

    image_id: str
    labels: tuple[DisagreedLabel, ...]
    picture: str | None


def review_sections(run_dir: str) -> list[Section]:
    """Return the report's section about a run's latest `hts review`; none without one."""
    stages = [
        stage
        for stage in finished_stages(run_dir, TABLE)
        if storage.exists(stage.file(AGREEMENT))  # another folder may be called review-something
    ]
    if not stages:
        return []
    content = storage.read_json(stages[-1].file(AGREEMENT))
    latest = find_stage(run_dir, "pseudo_labels")
    images = disagreed_images(content["disagreements"])
    html = environment(_TEMPLATES).get_template("review.html.j2").render(
        found=content,
        rows=_class_rows(content),
        file=stages[-1].file(AGREEMENT),
        images=[_with_picture(image, uri) for image, uri in images[:MAX_IMAGES]],
        differing=len(images),
        history=_history(stages) if len(stages) > 1 else [],
        newer=None if latest is None else _newer(latest, content),
    )  # fmt: skip
    return [Section("review", "Agreement with people", Markup(html))]  # noqa: S704 - escaped there


def disagreed_images(disagreements: Iterable[Content]) -> list[tuple[DisagreedImage, str]]:
    """Return the images with a disagreement, without pictures, and their URIs; the worst first.

    Wrong and missed labels come before those that the machine left undecided: only they teach
    the student something wrong.
    """
    labels: dict[str, list[DisagreedLabel]] = defaultdict(list)
    uris: dict[str, str] = {}
    for entry in disagreements:
        verdict = _VERDICTS[entry["machine"]]
        label = DisagreedLabel(verdict, entry["name"], entry["probability"])
        labels[entry["image_id"]].append(label)
        uris[entry["image_id"]] = entry["uri"] or ""
    images = [DisagreedImage(image_id, tuple(of), None) for image_id, of in labels.items()]
    return [(image, uris[image.image_id]) for image in sorted(images, key=_badness, reverse=True)]


def _badness(image: DisagreedImage) -> tuple[int, int, float]:
    mistakes = sum(label.verdict != "ignored" for label in image.labels)
    surest = max(label.probability or 0.0 for label in image.labels)
    return mistakes, len(image.labels), surest


def _with_picture(image: DisagreedImage, uri: str) -> DisagreedImage:
    return DisagreedImage(image.image_id, image.labels, stored_thumbnail(uri, *_THUMBNAIL))


def _class_rows(content: Content) -> list[Content]:
    """Return the figures of all classes together, then by class, most mistakes first."""
    by_class = sorted(
        content["per_class"], key=lambda row: (-(row["wrong"] + row["missed"]), row["name"])
    )
    return [{**content["overall"], "name": "all classes"}, *by_class]


def _history(stages: Iterable[StageFolder]) -> list[Content]:
    """Return the figures of every review of the run, in their order."""
    return [storage.read_json(stage.file(AGREEMENT)) for stage in stages]


def _newer(latest: StageFolder, content: Content) -> str | None:
    """Return the run's pseudo-labels where they are others than those that were compared."""
    name = f"{latest.table}-{latest.key}"
    return None if name == content["pseudo_labels"] else name
