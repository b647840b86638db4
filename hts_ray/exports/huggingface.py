"""A Hugging Face image folder: `SPLIT/NNNN/*.jpg`, `SPLIT/metadata.parquet` and a dataset card.

`datasets.load_dataset(FOLDER)` opens it, and it may be pushed to the hub as it is. Parquet holds
the metadata, because in JSON a column whose first lists are empty has no type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hts_ray.exports.card import CARD, dataset_card
from hts_ray.exports.files import FileNames
from hts_ray.exports.records import Context, ImageFile, LabeledImage
from hts_ray.exports.rows import label_columns, label_fields

METADATA = "metadata.parquet"
CLASSES = "classes.csv"
_ROWS = 1000

_USE = """
## Use

```python
from datasets import load_dataset

dataset = load_dataset("this-folder")  # or its name on the hub
print(dataset["{split}"][0]["labels"])
```

`classes.csv` lists all classes with their prompts.
"""


def write_huggingface(
    images: Iterable[tuple[LabeledImage, ImageFile]],
    context: Context,
    target: Path,
) -> None:
    """Write the images by split, their metadata and the card.

    Folders hold at most `shard_images` files each, because the hub allows 10,000.
    """
    target.mkdir(parents=True)
    splits: dict[str, _Split] = {}
    with ExitStack() as stack:
        for image, file in images:
            name = split_name(image.split)
            if name not in splits:
                splits[name] = stack.enter_context(_Split(target / name, context))
            splits[name].add(image, file)
    context.class_table.to_csv(target / CLASSES)
    config = {
        "config_name": "default",
        "data_files": [{"split": name, "path": f"{name}/**"} for name in sorted(splits)],
    }
    use = _USE.format(split=next(iter(sorted(splits)), "train"))
    (target / CARD).write_text(dataset_card(context, use, [config]), encoding="utf-8")


def split_name(split: str) -> str:
    """Return a split's name as `datasets` allows it: letters, digits and underscores."""
    return re.sub(r"\W+", "_", split, flags=re.ASCII).strip("_") or "all"


class _Split:
    """One split's folder; its rows are written in groups as they come."""

    def __init__(self, folder: Path, context: Context) -> None:
        self._folder = folder
        self._context = context
        self._names = FileNames()
        self._count = 0
        self._rows: list[dict[str, Any]] = []
        self._schema = pa.schema(
            [
                pa.field("file_name", pa.string()),
                pa.field("image_id", pa.string()),
                *label_fields(context),
            ]
        )

    def __enter__(self) -> _Split:
        self._folder.mkdir(parents=True)
        self._writer = pq.ParquetWriter(self._folder / METADATA, self._schema)
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, image: LabeledImage, file: ImageFile) -> None:
        """Write an image and keep its row for the next group."""
        part = f"{self._count // self._context.shard_images:04d}"
        if self._count % self._context.shard_images == 0:
            (self._folder / part).mkdir()
            self._names = FileNames()
        self._count += 1
        name = f"{part}/{self._names.of(image.image_id, file.suffix)}"
        (self._folder / name).write_bytes(file.data)
        row = {"file_name": name, "image_id": image.image_id}
        self._rows.append({**row, **label_columns(image, self._context)})
        if len(self._rows) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []
