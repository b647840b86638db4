"""Files of corrected labels: of the page of `hts report --review`, Label Studio, COCO and CSV.

Every reader returns what the file says: images by the names it has for them, classes by their
names. `hts_ray.review.importing` finds out what they are in a run.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hts_ray.errors import DataError
from hts_ray.exports import label_studio, tables
from hts_ray.report.review_page import FORMAT as PAGE_FORMAT
from hts_ray.store import storage

FORMATS = (
    "what the page of `hts report --review` saved, a Label Studio export (JSON: a list of tasks"
    " with annotations), COCO JSON (images, categories, annotations) or a CSV file with the"
    " columns image_id and positive"
)


@dataclass(frozen=True)
class ReadImage:
    """What a file says of one image.

    `image_id` is the run's own id where the file has it, `reference` a path or address.
    `negative` is None where the file lists no negatives, so that the other classes are open; in
    an image that was looked at in `full` they are open too.
    """

    reference: str
    image_id: str | None
    positive: tuple[str, ...]
    ambiguous: tuple[str, ...] = ()
    negative: tuple[str, ...] | None = None
    full: bool = False

    @property
    def called(self) -> str:
        """How messages name the image."""
        return self.image_id or self.reference or "(no name)"


@dataclass(frozen=True)
class Problem:
    """An entry that cannot be used: how the file calls the image, and why."""

    reference: str
    kind: str
    error: str


@dataclass(frozen=True)
class Sample:
    """What a file of the review page says of its images.

    Of `drawn` random images those count whose ids are here: all from the first on until one was
    left open. The reader chose which ones come later, and a choice is no sample.
    """

    pseudo_labels: str
    classes: tuple[str, ...]
    image_ids: tuple[str, ...]
    drawn: int


@dataclass(frozen=True)
class Read:
    """The images of a file, its bad entries, and counts of what is neither (not reviewed yet)."""

    images: tuple[ReadImage, ...]
    problems: tuple[Problem, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    sample: Sample | None = None


def read_labels(path: str) -> Read:
    """Read corrected labels of any of `FORMATS`. Raises DataError for any other file."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(f"no file {path}: check the path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file: give {FORMATS}") from error
    if not text.lstrip().startswith(("[", "{")):
        return read_csv(text, path)
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path} is not complete JSON: {error}: save or export it once more"
        ) from error
    if isinstance(document, dict) and document.get("format") == PAGE_FORMAT:
        return read_review_page(document, path)
    if isinstance(document, dict) and {"images", "categories"} <= document.keys():
        return read_coco(document, path)
    tasks = [document] if isinstance(document, dict) and "data" in document else document
    if isinstance(tasks, list) and all(
        isinstance(task, dict) and isinstance(task.get("data"), dict) for task in tasks
    ):
        return read_label_studio(tasks)
    raise DataError(f"{path} is none of the known formats: give {FORMATS}")


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    image_id: str
    part: Literal["random", "uncertain"]
    seen: int | None
    done: bool
    right: list[str] = []
    wrong: list[str] = []
    missing: list[str] = []
    absent: list[str] = []
    unsure: list[str] = []


class _SavedPage(BaseModel):
    model_config = ConfigDict(strict=True)

    version: Literal[1]
    pseudo_labels: str
    classes: list[str]
    images: list[_Entry]


def read_review_page(document: Mapping[str, Any], path: str = "the file") -> Read:
    """Read what the page of `hts report --review` saved: the images that are done.

    Images that were drawn at random were looked at in full. Raises DataError naming the first
    field that is missing or wrong.
    """
    try:
        page = _SavedPage.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        raise DataError(
            f"{path}, field {where.lstrip('.')}: {first['msg']}: save the file from the page again"
        ) from error
    done = [entry for entry in page.images if entry.done]
    drawn = [entry for entry in page.images if entry.part == "random"]
    in_a_row = takewhile(lambda entry: entry.done, drawn)
    images = [
        ReadImage(
            reference="",
            image_id=entry.image_id,
            positive=(*entry.right, *entry.missing),
            ambiguous=tuple(entry.unsure),
            negative=(*entry.wrong, *entry.absent),
            full=entry.part == "random",
        )
        for entry in done
    ]
    counts = {
        "not_reviewed": len(page.images) - len(done),
        "seen_and_left_open": sum(
            entry.seen is not None and not entry.done for entry in page.images
        ),
        "labels_nobody_could_tell": sum(len(entry.unsure) for entry in done),
    }
    counting = tuple(dict.fromkeys(entry.image_id for entry in in_a_row))
    sample = Sample(page.pseudo_labels, tuple(page.classes), counting, len(drawn))
    return Read(tuple(images), counts=counts, sample=sample)


def read_label_studio(tasks: Sequence[Mapping[str, Any]]) -> Read:
    """Read exported tasks: the last annotation of each that was not cancelled counts.

    - One that was marked as ground truth comes before all others.
    - What is ticked in the control `unsure` is ambiguous, what is ticked elsewhere positive.
    - Boxes count only in files that have nothing ticked at all.
    """
    chosen, counts = [], Counter({"not_reviewed": 0, "several_annotations": 0})
    for task in tasks:
        annotations = [
            entry
            for entry in task.get("annotations") or ()
            if isinstance(entry, dict) and not entry.get("was_cancelled")
        ]
        counts["not_reviewed"] += not annotations
        counts["several_annotations"] += len(annotations) > 1
        if annotations:
            last = max(annotations, key=_precedence)
            result = [entry for entry in last.get("result") or () if isinstance(entry, dict)]
            chosen.append((task["data"], result))
    ticked = any(entry.get("type") == "choices" for _, result in chosen for entry in result)
    images = [
        ReadImage(
            reference=_image_value(data),
            image_id=_text(data.get("image_id")),
            positive=_labels(result, ticked, unsure=False),
            ambiguous=_labels(result, ticked, unsure=True),
        )
        for data, result in chosen
    ]
    return Read(tuple(images), counts=counts)


def _precedence(annotation: Mapping[str, Any]) -> tuple[bool, str]:
    when = annotation.get("updated_at") or annotation.get("created_at") or ""
    return bool(annotation.get("ground_truth")), str(when)


def _image_value(data: Mapping[str, Any]) -> str:
    found = data.get(label_studio.IMAGE)
    if isinstance(found, str):
        return found
    return next((value for value in data.values() if isinstance(value, str)), "")


def _labels(result: Iterable[Mapping[str, Any]], ticked: bool, *, unsure: bool) -> tuple[str, ...]:
    kind = "choices" if ticked else "rectanglelabels"
    names: list[str] = []
    for entry in result:
        value = entry.get("value")
        is_unsure = entry.get("from_name") == label_studio.UNSURE
        if entry.get("type") == kind and is_unsure == unsure and isinstance(value, dict):
            names += [name for name in value.get(kind) or () if isinstance(name, str)]
    return tuple(dict.fromkeys(names))


def read_coco(document: Mapping[str, Any], path: str = "the file") -> Read:
    """Read COCO JSON: a class with at least one annotation is positive.

    Our own `ignored_category_ids` of an image are ambiguous, LVIS's `neg_category_ids` negative.
    Raises DataError when entries lack what the format asks for.
    """

    def named(ids: Iterable[Any] | None) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names.get(i, f"#{i}") for i in ids or ()))

    try:
        names = {entry["id"]: str(entry["name"]) for entry in document["categories"]}
        images = {entry["id"]: entry for entry in document["images"]}
        labels = [(a["image_id"], a["category_id"]) for a in document.get("annotations") or ()]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not COCO JSON: {type(error).__name__} {error}") from error
    positive: defaultdict[Any, list[Any]] = defaultdict(list)
    for image_id, category_id in labels:
        positive[image_id].append(category_id)
    read = []
    for key, entry in images.items():
        ignored, negatives = entry.get("ignored_category_ids"), entry.get("neg_category_ids")
        read.append(
            ReadImage(
                reference=str(entry.get("file_name", "")),
                image_id=_text(entry.get("hts_image_id")),
                positive=named(positive[key]),
                ambiguous=named(i for i in ignored or () if i not in positive[key]),
                negative=None if negatives is None else named(negatives),
            )
        )
    strays = sum(image_id not in images for image_id, _ in labels)
    return Read(tuple(read), counts={"annotations_without_image": strays})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def read_csv(text: str, path: str = "the file") -> Read:
    """Read a table with one line an image, class names separated by `|`.

    Columns: `image_id` or `uri`; `positive`; `ignored` and `negative` where they are known.
    Others are left alone. Raises DataError for a missing column.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cells)]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}: check the quotes") from error
    header = [name.strip() for name in lines[0][1]] if lines else []
    where = [name for name in (tables.IMAGE_ID, tables.URI) if name in header]
    if not where or tables.POSITIVE not in header:
        raise DataError(
            f"{path} has the columns {', '.join(header) or 'none'}: it needs image_id (or uri) and"
            f" positive; otherwise give {FORMATS}"
        )
    images, problems = [], []
    for line, cells in lines[1:]:
        row = dict(zip(header, cells, strict=False))
        reference = row.get(tables.URI) or row.get(tables.IMAGE_ID) or ""
        if len(cells) != len(header):
            reason = f"line {line} has {len(cells)} cells, the header {len(header)}: quote commas"
            problems.append(Problem(reference, "bad_line", reason))
            continue
        positive, ambiguous = (
            _split(row.get(name, "")) for name in (tables.POSITIVE, tables.IGNORED)
        )
        negative = _split(row[tables.NEGATIVE]) if tables.NEGATIVE in header else None
        image_id = row.get(tables.IMAGE_ID) or None
        images.append(ReadImage(reference, image_id, positive, ambiguous, negative))
    return Read(tuple(images), tuple(problems))


def _split(cell: str) -> tuple[str, ...]:
    names = (name.strip() for name in cell.split(tables.SEPARATOR))
    return tuple(dict.fromkeys(name for name in names if name))
