"""One CSV file, a row an image: what a spreadsheet opens, and `hts import-labels` reads again.

Class names of an image stand in one cell with `|` between them, as prompts do in class lists.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from hts_ray.errors import ConfigError
from hts_ray.exports.records import Context, LabeledImage

SEPARATOR = "|"
IMAGE_ID, URI, SPLIT = "image_id", "uri", "split"
POSITIVE, IGNORED, NEGATIVE = "positive", "ignored", "negative"
PROBABILITY, SUPPORT = "probability", "support"


def columns(context: Context) -> tuple[str, ...]:
    """Return the header: annotations list negatives, machine labels their probability."""
    more = (PROBABILITY, SUPPORT) if context.origin.kind == "pseudo_labels" else (NEGATIVE,)
    return (IMAGE_ID, URI, SPLIT, POSITIVE, IGNORED, *more)


def cells(image: LabeledImage, context: Context) -> dict[str, str]:
    """Return an image's cells by column, those that the header leaves out included."""
    return {
        IMAGE_ID: image.image_id,
        URI: image.uri,
        SPLIT: image.split,
        POSITIVE: _joined(context.names_of(image.positive_ids)),
        IGNORED: _joined(context.names_of(image.ignored_ids)),
        NEGATIVE: _joined(context.names_of(image.negative_ids or ())),
        PROBABILITY: _joined([f"{p:.4f}" for p in image.probability]),
        SUPPORT: _joined([str(count) for count in image.support]),
    }


def write_csv(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write a header and one line an image, as UTF-8 with a mark that spreadsheets look for.

    Raises ConfigError for class names that hold the separator.
    """
    for name in context.class_table.names:
        if SEPARATOR in name:
            raise ConfigError(
                f"the class name {name!r} holds {SEPARATOR!r}, which separates names in a cell",
                field="--format",
                value="csv",
                remedy="take parquet",
            )
    header = columns(context)
    with open(target, "w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for image in images:
            writer.writerow(cells(image, context))


def _joined(values: Sequence[str]) -> str:
    return SEPARATOR.join(values)
