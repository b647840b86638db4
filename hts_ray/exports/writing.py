"""One call for every format: read the labels, write them beside their place, put them there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hts_ray.config import ExportConfig
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports.anno_mat import write_anno_mat
from hts_ray.exports.coco import write_coco
from hts_ray.exports.csv_file import write_csv
from hts_ray.exports.fiftyone import write_fiftyone
from hts_ray.exports.files import listed, measured, with_files
from hts_ray.exports.huggingface import write_huggingface
from hts_ray.exports.label_studio import write_label_studio
from hts_ray.exports.parquet_file import write_parquet
from hts_ray.exports.records import Context, ImageFile, LabeledImage, Tally
from hts_ray.exports.source import LabelRows
from hts_ray.exports.webdataset import write_webdataset
from hts_ray.store import storage
from hts_ray.store.outputs import new_output, refuse_existing

MARKER = "hts_export.json"  # in every folder that an export makes: what it is and what it counted


@dataclass(frozen=True)
class Format:
    """How a format is written; a suffix means one file, none a folder.

    Of `labels`, `sized` and `files` one is set: what the images come with. `boxes` tells whether
    it has a place for regions.
    """

    suffix: str = ""
    boxes: bool = False
    labels: Callable[[Iterable[LabeledImage], Context, Path], None] | None = None
    sized: Callable[[Iterable[LabeledImage], Context, Path], None] | None = None
    files: Callable[[Iterable[tuple[LabeledImage, ImageFile]], Context, Path], None] | None = None


FORMATS: dict[str, Format] = {
    "coco": Format(".json", boxes=True, sized=write_coco),
    "fiftyone": Format(boxes=True, files=write_fiftyone),
    "huggingface": Format(files=write_huggingface),
    "webdataset": Format(files=write_webdataset),
    "anno-mat": Format(".mat", labels=write_anno_mat),
    "csv": Format(".csv", labels=write_csv),
    "parquet": Format(".parquet", labels=write_parquet),
    "label-studio": Format(boxes=True, sized=write_label_studio),
}


@dataclass(frozen=True)
class Exported:
    """What an export wrote: counts of images and labels, and of images that it left out."""

    path: str
    images: int
    positives: int
    classes_with_positive: int
    bad_images: Counter[str]
    notes: tuple[str, ...]

    def figures(self) -> dict[str, Any]:
        """Return the counts by name, for a table or JSON."""
        return {
            "images": self.images,
            "positive labels": self.positives,
            "classes with a positive": self.classes_with_positive,
            "images left out": self.bad_images.total(),
            **{f"left out: {kind}": count for kind, count in self.bad_images.most_common()},
        }


def check_output(form: str, output: str, force: bool = False) -> None:
    """Raise ConfigError when `output` has another suffix than the format's files, or exists."""
    suffix = FORMATS[form].suffix
    name = output.rstrip("/").rsplit("/", 1)[-1]
    if suffix and not name.endswith(suffix):
        remedy = f"--format {form} writes a file: end its name in {suffix}"
        raise ConfigError(field="--output", value=output, remedy=remedy)
    if not suffix and name.endswith(
        tuple(entry.suffix for entry in FORMATS.values() if entry.suffix)
    ):
        raise ConfigError(
            field="--output", value=output, remedy=f"--format {form} writes a folder: name one"
        )
    refuse_existing(output, replace=force, marker=MARKER)


def export_labels(
    run: Run, rows: LabelRows, form: str, output: str, *, force: bool = False
) -> Exported:
    """Write labels to `output` in a format of `FORMATS`.

    Images that cannot be read are left out and counted. With `force` an earlier export is
    replaced, and nothing else. Raises ConfigError as `check_output` and where the format cannot
    hold these labels, DataError when no image or no positive label is left; then nothing is
    written.
    """
    check_output(form, output, force)
    config = run.config.export
    context = Context(
        run.class_table,
        rows.origin,
        image_url_prefix=config.image_url_prefix,
        image_root=config.image_root or rows.root,
        shard_images=config.shard_images,
    )
    tally = context.tally
    with new_output(output, replace=force, marker=MARKER, last=MARKER) as target:
        _write(FORMATS[form], rows, context, config, target)
        _require_content(tally, output)
        if target.is_dir():
            (target / MARKER).write_text(_marker(form, rows, tally), encoding="utf-8")
    return Exported(
        output,
        tally.images,
        tally.positives,
        sum(1 for count in tally.per_class.values() if count),
        tally.bad_images,
        (*rows.notes, *_notes(form, output, rows, context), *tally.examples),
    )


def _write(
    form: Format,
    rows: LabelRows,
    context: Context,
    config: ExportConfig,
    target: Path,
) -> None:
    images, tally = rows.images(), context.tally
    if form.files is not None:
        form.files(with_files(images, tally, config.workers), context, target)
        return
    write = form.sized or form.labels
    assert write is not None
    if form.sized is not None or config.check_images:
        known = not config.check_images
        images = measured(images, tally, config.workers, known_sizes=known)
    else:
        images = listed(images, tally)
    write(images, context, target)


def _require_content(tally: Tally, output: str) -> None:
    if not tally.images:
        reasons = ", ".join(f"{kind} {count}" for kind, count in tally.bad_images.most_common())
        first = f"; the first is {tally.examples[0]}" if tally.examples else ""
        raise DataError(f"no image is left to export to {output}: {reasons or 'none'}{first}")
    if not tally.positives:
        raise DataError(
            f"{tally.images} images and not one positive label: nothing is written to {output}"
        )


def _marker(form: str, rows: LabelRows, tally: Tally) -> str:
    origin = rows.origin
    content = {
        "format": form,
        "labels": origin.name,
        "kind": origin.kind,
        "teacher": origin.teacher,
        "teacher_revision": origin.teacher_revision,
        "filter": dict(origin.settings),
        "details": dict(origin.details),
        "images": tally.images,
        "positives": tally.positives,
        "bad_images": dict(tally.bad_images),
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _notes(form: str, output: str, rows: LabelRows, context: Context) -> tuple[str, ...]:
    """Say how to open what was written, and what will not work as it is."""
    if form == "huggingface":
        return (f"datasets.load_dataset({output!r})", f"{output}/README.md is its card")
    if form == "fiftyone":
        kind = "fiftyone.types.COCODetectionDataset"
        return (f"fiftyone.Dataset.from_dir({output!r}, {kind})",)
    if form == "anno-mat":
        return ("images go by their file names there, without folders",)
    if form == "label-studio":
        notes = [f"paste {output}/labeling_config.xml into the project, then import tasks.json"]
        local = next(iter(rows.table["uri"].to_pylist()[:1]), "")
        if context.image_url_prefix is None and not storage.is_remote(local):
            notes.append(
                "the images are local paths, which a browser does not load:"
                " set export.image_url_prefix (docs/review.md)"
            )
        return tuple(notes)
    return ()
