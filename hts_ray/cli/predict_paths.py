"""`hts predict PATH`: images labeled in this process, printed and drawn."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import click

from hts_ray.classifier import Prediction, find_images, load
from hts_ray.engine.console import console, errors, image_progress, print_mapping, print_rows
from hts_ray.errors import DataError
from hts_ray.exports.drawing import draw_predictions, require_empty

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

    Images that cannot be used are reported on standard error. Raises DataError when none can be
    used, ConfigError when the folder to draw into is not empty.
    """
    if draw is not None:
        require_empty(draw)
    found, bad = find_images(paths)
    if dry_run:
        plan = {"student": student, "images": len(found), "unusable": len(bad), "draw": draw}
        print_mapping("plan", plan)
        return
    shown: Iterator[Prediction] = iter(bad)
    if found:
        top_k = 5 if top_k is None and threshold is None else top_k
        labeled = load(student).iterate(found, top_k, threshold, regions=regions, on_error="keep")
        shown = chain(bad, labeled)
    if draw is not None:
        shown = draw_predictions(shown, draw)
    if console.is_interactive and not json_lines:
        shown = _watched(shown, len(found) + len(bad))
    counts: Counter[str] = Counter()
    good = _usable(shown, counts, json_lines)
    if json_lines:
        for prediction in good:
            _print_json(prediction)
    else:
        _print_table(good)
    if counts["failed"]:
        errors.print(f"{counts['failed']} of {counts.total()} images could not be used")
    if not counts["good"]:
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


def _usable(
    predictions: Iterable[Prediction], counts: Counter[str], json_lines: bool
) -> Iterator[Prediction]:
    """Yield the good ones and count both kinds; report the others on standard error."""
    for prediction in predictions:
        counts["good" if prediction.error is None else "failed"] += 1
        if prediction.error is None:
            yield prediction
            continue
        # A progress bar keeps out of the way of sys.stderr, but not of another console.
        sys.stderr.write(f"{prediction.source}: {prediction.error}\n")
        if json_lines:
            _print_json(prediction)


def _print_json(prediction: Prediction) -> None:
    click.echo(json.dumps(prediction.to_dict(), ensure_ascii=False))


def _print_table(predictions: Iterator[Prediction]) -> None:
    """Print a table for every thousand images, so that a long run shows what it has."""
    while batch := list(islice(predictions, _TABLE_IMAGES)):
        rows = [row for prediction in batch for row in _rows(prediction)]
        header = ["image", "label", "where", "score"]
        if not any(where for _, _, where, _ in rows):
            rows, header = [[*row[:2], row[3]] for row in rows], ["image", "label", "score"]
        print_rows("labels", header, rows, text_columns=len(header) - 1)


def _rows(prediction: Prediction) -> Iterator[list[str]]:
    name = prediction.source
    if not prediction.labels:
        yield [name, "-", "", "-"]
    for label in prediction.labels:
        where = " ".join(f"{side:.0f}" for side in label.box) if label.box else ""
        yield [name, label.name, where, f"{label.score:.2f}"]
        name = ""
