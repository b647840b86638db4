"""A Hugging Face image folder: `SPLIT/NNNN/*.jpg`, `SPLIT/metadata.parquet` and a dataset card.

`datasets.load_dataset(FOLDER)` opens it, and it can be pushed to the hub as it is. The metadata is
Parquet, because in JSON a column whose first lists are empty has no type.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa

from hts_ray.exports.card import CARD, dataset_card
from hts_ray.exports.image_files import FileNames
from hts_ray.exports.records import Context, LabeledImage
from hts_ray.exports.tables import RowWriter, label_columns, label_fields

METADATA = "metadata.parquet"
CLASSES = "classes.csv"


def write_huggingface(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write the images by split, their metadata and the card.

    Folders hold at most `shard_images` files each, because the hub allows 10,000.
    """
    target.mkdir(parents=True)
    columns = [pa.field(name, pa.string()) for name in ("file_name", "image_id")]
    schema = pa.schema([*columns, *label_fields(context)])
    rows: dict[str, RowWriter] = {}
    names: dict[str, FileNames] = {}  # taken in a split's last folder
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        for image in images:
            assert image.file is not None
            split = split_name(image.split)
            part, first = divmod(counts[split], context.shard_images)
            folder = target / split / f"{part:04d}"
            if first == 0:
                folder.mkdir(parents=True)
                names[split] = FileNames()
            if split not in rows:
                rows[split] = stack.enter_context(RowWriter(target / split / METADATA, schema))
            counts[split] += 1
            name = names[split].of(image.image_id, image.file.suffix)
            (folder / name).write_bytes(image.file.data)
            row = {"file_name": f"{folder.name}/{name}", "image_id": image.image_id}
            rows[split].add({**row, **label_columns(image, context)})
    context.class_table.to_csv(target / CLASSES)
    config = {
        "config_name": "default",
        "data_files": [{"split": name, "path": f"{name}/**"} for name in sorted(rows)],
    }
    card = dataset_card(context, "huggingface", [config], split=min(rows, default="train"))
    (target / CARD).write_text(card, encoding="utf-8")


def split_name(split: str) -> str:
    """Return a split's name as `datasets` allows it: letters, digits and underscores."""
    return re.sub(r"\W+", "_", split, flags=re.ASCII).strip("_") or "all"
