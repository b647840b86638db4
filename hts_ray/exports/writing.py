"""One call for every format: read the labels, write them beside their place, put them there."""

from __future__ import annotations

import json
from dataclasses import dataclass

from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports.anno_mat import write_anno_mat
from hts_ray.exports.coco import write_coco, write_fiftyone
from hts_ray.exports.hub import write_huggingface, write_webdataset
from hts_ray.exports.image_files import with_files
from hts_ray.exports.label_studio import write_label_studio
from hts_ray.exports.records import Context, Format, Tally
from hts_ray.exports.source import LabelRows
from hts_ray.exports.tables import write_csv, write_parquet
from hts_ray.store.outputs import new_output, refuse_existing

MARKER = "hts_export.json"  # in every folder that an export makes: what it is and what it counted

FORMATS: dict[str, Format] = {
    "coco": Format(write_coco, ".json", "sizes", boxes=True, correctable=True),
    "fiftyone": Format(
        write_fiftyone,
        needs="files",
        boxes=True,
        notes=("fiftyone.Dataset.from_dir({output!r}, fiftyone.types.COCODetectionDataset)",),
        correctable=True,
    ),
    "huggingface": Format(
        write_huggingface,
        needs="files",
        notes=("datasets.load_dataset({output!r})", "{output}/README.md is its card"),
    ),
    "webdataset": Format(write_webdataset, needs="files"),
    "anno-mat": Format(
        write_anno_mat, ".mat", notes=("images go by their file names there, without folders",)
    ),
    "csv": Format(write_csv, ".csv", correctable=True),
    "parquet": Format(write_parquet, ".parquet"),
    "label-studio": Format(
        write_label_studio,
        needs="sizes",
        boxes=True,
        notes=("paste {output}/labeling_config.xml into the project, then import tasks.json",),
        correctable=True,
    ),
}
_SUFFIXES = tuple(entry.suffix for entry in FORMATS.values() if entry.suffix)
_LOCAL_PATHS = (
    "the images are local paths, which a browser does not load:"
    " set export.image_url_prefix (docs/review.md)"
)


@dataclass(frozen=True)
class Exported:
    """What an export wrote to `path`, and what the user should know of it."""

    path: str
    tally: Tally
    notes: tuple[str, ...]


def check_output(form: str, output: str, force: bool = False) -> None:
    """Raise ConfigError when `output` has another suffix than the format's files, or exists."""
    suffix = FORMATS[form].suffix
    name = output.rstrip("/").rsplit("/", 1)[-1]
    remedy = ""
    if suffix and not name.endswith(suffix):
        remedy = f"--format {form} writes a file: end its name in {suffix}"
    elif not suffix and name.endswith(_SUFFIXES):
        remedy = f"--format {form} writes a folder: name one"
    if remedy:
        raise ConfigError(field="--output", value=output, remedy=remedy)
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
    config, chosen = run.config.export, FORMATS[form]
    context = Context(run.class_table, rows.origin, config, rows.root)
    tally = context.tally
    images = with_files(
        rows.images(), chosen.needs, tally, config.workers, check=config.check_images
    )
    with new_output(output, replace=force, marker=MARKER, last=MARKER) as target:
        chosen.write(images, context, target)
        _require_content(tally, output)
        if target.is_dir():
            (target / MARKER).write_text(_marker(form, rows, tally), encoding="utf-8")
    notes = [note.format(output=output) for note in chosen.notes]
    if form == "label-studio" and config.image_url_prefix is None and rows.are_local:
        notes.append(_LOCAL_PATHS)
    return Exported(output, tally, (*rows.notes, *notes, *tally.examples))


def _require_content(tally: Tally, output: str) -> None:
    if not tally.images:
        reasons = tally.reasons()
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
