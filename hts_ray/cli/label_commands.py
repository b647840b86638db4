"""What the commands about labels print and write: predict PATH, export, import-labels, review."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hts_ray.engine.console import (
    console,
    errors,
    image_progress,
    percent,
    print_line,
    print_mapping,
    print_next,
    print_rows,
    print_written,
)
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage
from hts_ray.store.run import StageFolder, find_stage, given_stage, require_stage

if TYPE_CHECKING:
    from hts_ray.classifier import Prediction
    from hts_ray.review.agreement import Agreement, Counts

_SHOWN_DISAGREEMENTS = 10
_SHOWN_CLASSES = 10
_TABLE_IMAGES = 1000


def predict_paths(
    student: str,
    paths: Sequence[str],
    *,
    top_k: int | None,
    threshold: float | None,
    regions: bool,
    draw: str | None,
    json_lines: bool,
    dry_run: bool = False,
) -> None:
    """Label images and print them as a table or as JSON lines; draw them where asked.

    Images that cannot be used are told on standard error. Raises DataError when none can be,
    ConfigError when the folder to draw into holds something already.
    """
    from hts_ray.classifier import find_images, load

    if draw is not None:
        _require_empty(draw)
    found, bad = find_images(paths)
    if dry_run:
        plan = {"student": student, "images": len(found), "unusable": len(bad), "draw": draw}
        print_mapping("plan", plan)
        return
    top_k = 5 if top_k is None and threshold is None else top_k
    model = load(student) if found else None
    shown: Iterator[Prediction] = iter(bad)
    if model is not None:
        labeled = model.iterate(found, top_k, threshold, regions=regions, on_error="keep")
        shown = itertools.chain(bad, labeled)
    if draw is not None:
        shown = _drawn(shown, draw)
    if console.is_interactive and not json_lines:
        shown = _watched(shown, len(found) + len(bad))
    failed = [0]
    good = _told_apart(shown, failed, json_lines)
    count = _print_lines(good) if json_lines else _print_table(good)
    if failed[0]:
        errors.print(f"{failed[0]} of {count + failed[0]} images could not be used")
    if not count:
        raise DataError("no image could be used")
    if draw is not None:
        errors.print(f"drawn -> {draw}", markup=False)


def _watched(predictions: Iterable[Prediction], total: int) -> Iterator[Prediction]:
    """Show on the terminal how many are done as they pass."""
    failed = 0
    with image_progress("predict") as progress:
        for done, prediction in enumerate(predictions, start=1):
            failed += prediction.error is not None
            progress(done, total, failed)
            yield prediction


def _require_empty(folder: str) -> None:
    if storage.list_names(folder):
        raise ConfigError(
            "the folder holds something already", field="--draw", value=folder,
            remedy="name an empty or a new one",
        )  # fmt: skip


def _told_apart(
    predictions: Iterable[Prediction], failed: list[int], json_lines: bool
) -> Iterator[Prediction]:
    """Yield the good ones; report the others where a pipe of the output does not meet them."""
    for prediction in predictions:
        if prediction.error is None:
            yield prediction
            continue
        failed[0] += 1
        # Not by a console: only what passes through sys.stderr is kept out of a bar.
        sys.stderr.write(f"{prediction.source}: {prediction.error}\n")
        if json_lines:
            click.echo(json.dumps(prediction.to_dict(), ensure_ascii=False))


def _print_lines(predictions: Iterable[Prediction]) -> int:
    count = 0
    for prediction in predictions:
        click.echo(json.dumps(prediction.to_dict(), ensure_ascii=False))
        count += 1
    return count


def _print_table(predictions: Iterable[Prediction]) -> int:
    """Print tables of many images at a time, so that a long run shows what it has."""
    count = 0
    remaining = iter(predictions)
    while batch := list(itertools.islice(remaining, _TABLE_IMAGES)):
        rows = [row for prediction in batch for row in _rows(prediction)]
        located = any(label.box for prediction in batch for label in prediction.labels)
        header = ["image", "label", *(["where"] if located else []), "score"]
        if not located:
            rows = [[image, name, score] for image, name, _, score in rows]
        print_rows("labels", header, rows, text_columns=len(header) - 1)
        count += len(batch)
    return count


def _rows(prediction: Prediction) -> Iterator[list[str]]:
    name = prediction.source
    if not prediction.labels:
        yield [name, "-", "", "-"]
    for label in prediction.labels:
        where = " ".join(f"{side:.0f}" for side in label.box) if label.box else ""
        yield [name, label.name, where, f"{label.score:.2f}"]
        name = ""


def _drawn(predictions: Iterable[Prediction], folder: str) -> Iterator[Prediction]:
    """Draw every good prediction as it passes, under the image's own name."""
    import io

    from hts_ray.exports.drawing import draw_labels

    taken: set[str] = set()
    for prediction in predictions:
        if prediction.error is None and prediction.pixels is not None:
            picture = draw_labels(
                prediction.pixels, prediction.labels, prediction.width, prediction.height
            )
            sink = io.BytesIO()
            picture.save(sink, "JPEG", quality=92)
            name = _free_name(prediction.source, taken)
            storage.write_bytes(storage.join(folder, name), sink.getvalue())
        yield prediction


def _free_name(source: str, taken: set[str]) -> str:
    stem = Path(source.rstrip("/").rsplit("/", 1)[-1]).stem
    stem = re.sub(r"[^\w.-]+", "_", stem) or "image"
    name, number = f"{stem}.jpg", 1
    while name.casefold() in taken:
        number += 1
        name = f"{stem}-{number}.jpg"
    taken.add(name.casefold())
    return name


def export_command(
    run: Run,
    form: str,
    output: str,
    *,
    labels: str | None,
    manifest: str | None,
    split: str | None,
    limit: int | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Write labels in a format of `hts_ray.exports.writing.FORMATS` and print what was counted."""
    from hts_ray.exports.source import read_labels
    from hts_ray.exports.writing import FORMATS, check_output, export_labels

    check_output(form, output, force)
    boxes = FORMATS[form].boxes
    rows = read_labels(run, labels, manifest, split=split, limit=limit, regions=boxes)
    if dry_run:
        plan = {"read": rows.origin.name, "images": len(rows), "format": form, "write": output}
        print_mapping("plan", plan)
        return
    done = export_labels(run, rows, form, output, force=force)
    print_written(f"export of {rows.origin.name}", done.path)
    print_mapping("counted", done.figures())
    for note in done.notes:
        print_line(note)
    if FORMATS[form].correctable:
        run_dir = run.config.run_dir
        print_next("hts", "import-labels", "FILE", "--run-dir", run_dir, "--output", "corrected")


def import_command(
    run: Run,
    file: str,
    output: str,
    *,
    manifest: str | None,
    labels: str | None,
    unmarked: Any,
    split: str,
    validation_share: float | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Turn a file of corrected labels into a labeled manifest and overrides for the filter."""
    from hts_ray.labels.corrections import OVERRIDES
    from hts_ray.review.importing import import_labels, write_import
    from hts_ray.review.measuring import AGREEMENT, agreement_of
    from hts_ray.review.reading import read_labels
    from hts_ray.store.outputs import refuse_existing

    refuse_existing(output, replace=force, marker=OVERRIDES)
    imported = import_labels(
        read_labels(file),
        run.manifest(manifest).table,
        run.class_table,
        unmarked=unmarked,
        split=split,
        validation_share=validation_share,
        seed=run.config.seed,
    )
    stage = _labels_stage(run, labels)
    found, content = None, None
    if stage is not None:
        found, content = agreement_of(run, imported.corrections, stage)
    if dry_run:
        print_mapping("plan", {"write": output, **imported.counts})
        return
    write_import(imported, output, {AGREEMENT: content} if content else {}, force=force)
    print_written("import-labels", output)
    print_mapping("counted", imported.counts)
    if imported.counts["quarantined"]:
        console.print(f"{imported.counts['quarantined']} entries could not be used:")
        for row in imported.quarantine.slice(0, _SHOWN_DISAGREEMENTS).to_pylist():
            print_line(f"  {row['image_id']}: {row['error']}")
        print_line(f"all are listed in {storage.join(output, 'quarantine')}")
    if found is not None and content is not None:
        print_agreement(found, content)
    _advise(run, output, split, parted=validation_share is not None)


def _advise(run: Run, output: str, split: str, *, parted: bool) -> None:
    where = ["--run-dir", run.config.run_dir]
    print_next("hts", "filter", *where, f"filter.overrides={output}", why="to train on them")
    predict = ["hts", "predict", *where, "--manifest", output, f"predict.split={split}"]
    print_next(*predict, why="to validate on them")
    print_next("hts", "evaluate", *where, "--annotations", output, "--split", split, why="and then")
    if not parted:
        console.print("not both at once: they are the same images (--validation-share parts them)")
    print_next("hts", "review", output, *where)


def _labels_stage(run: Run, given: str | None) -> StageFolder | None:
    if given is not None:
        return given_stage(given, "pseudo_labels")
    return find_stage(run.run_dir, "pseudo_labels")


def review_command(
    run: Run,
    corrections: str,
    *,
    labels: str | None,
    json_file: str | None,
    dry_run: bool,
) -> None:
    """Compare corrections with the run's pseudo-labels; print the agreement and store it."""
    from hts_ray.review.measuring import corrections_of, review

    stage = _labels_stage(run, labels) or require_stage(run.run_dir, "pseudo_labels", "filter")
    if dry_run:
        count = len(corrections_of(corrections))
        print_mapping("plan", {"read": corrections, "images": count, "compare with": stage.path})
        return
    found, content = review(run, corrections, stage)
    if json_file:
        storage.write_json(json_file, content)
    print_agreement(found, content)
    print_next("hts", "report", run.config.run_dir)


def print_agreement(found: Agreement, content: Mapping[str, Any]) -> None:
    """Print the agreement overall, by class and the first disagreements.

    `content` is its JSON, which tells of corrections that the labels have applied.
    """
    overall = found.overall
    figures = {
        "images in both": f"{found.images} ({found.images_equal} without a difference)",
        "precision": _figure(overall, "precision"),
        "recall": _figure(overall, "recall"),
        "Cohen's kappa": "-" if overall.kappa is None else f"{overall.kappa:.2f}",
        "wrong positives": overall.wrong,
        "missed": f"{overall.missed} called negative, {overall.undecided} undecided",
    }
    if content["applied"]:
        figures["note"] = "these labels were made from these corrections: of course they agree"
    elif content["left_out_as_applied"]:
        figures["left out"] = f"{content['left_out_as_applied']} images whose corrections they hold"
    print_mapping(f"agreement of {content['pseudo_labels']} with people", figures)
    worst = sorted(found.per_class.items(), key=lambda entry: -(entry[1].wrong + entry[1].missed))[
        :_SHOWN_CLASSES
    ]
    names = {entry.class_id: entry.name for entry in found.disagreements}
    rows = [
        [
            names[class_id],
            percent(counts.precision),
            percent(counts.recall),
            *(str(value) for value in (counts.confirmed, counts.wrong, counts.missed)),
        ]
        for class_id, counts in worst
        if class_id in names
    ]
    if rows:
        header = ["class", "precision, %", "recall, %", "right", "wrong", "missed"]
        print_rows("classes with most mistakes", header, rows)
    rows = [
        [entry.image_id, entry.name, entry.machine, entry.human]
        for entry in found.disagreements[:_SHOWN_DISAGREEMENTS]
    ]
    if rows:
        title = f"disagreements ({len(rows)} of {len(found.disagreements)})"
        print_rows(title, ["image", "class", "machine", "people"], rows, text_columns=4)


def _figure(counts: Counts, name: str) -> str:
    values = counts.to_dict()
    interval = values[f"{name}_interval"]
    if interval is None:
        return "-"
    low, high = (percent(side) for side in interval)
    return f"{percent(values[name])} % (95 % interval {low} to {high})"
