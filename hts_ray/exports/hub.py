"""Folders for a hub: Hugging Face's image folder and WebDataset shards, each with a dataset card.

- `datasets.load_dataset(FOLDER)` opens the image folder: `SPLIT/NNNN/*.jpg` and
  `SPLIT/metadata.parquet`. The metadata is Parquet, because in JSON a column whose first lists are
  empty has no type.
- A shard is a tar file in which an image and its labels share a key: sample N of a split is
  `NNNNNNNN.jpg` (or the image's own suffix) and `NNNNNNNN.json`. Tar headers carry no time and no
  user, so the same labels give the same files.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hts_ray.exports.image_files import FileNames
from hts_ray.exports.records import Context, LabeledImage
from hts_ray.exports.tables import RowWriter, label_columns, label_fields

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_SETTINGS = (
    "aggregation", "top_k", "prior", "prior_alpha", "temperature", "positive_threshold",
    "negative_threshold", "per_class_quantile", "quantile_floor", "min_support",
    "support_threshold", "max_positives_per_image", "region_kinds", "margins",
)  # fmt: skip
METADATA = "metadata.parquet"


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
            part, first = divmod(counts[split], context.config.shard_images)
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
    data_files = [{"split": name, "path": f"{name}/**"} for name in sorted(rows)]
    config = {"config_name": "default", "data_files": data_files}
    _describe(context, target, "huggingface", [config], split=min(rows, default="train"))


def write_webdataset(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write `SPLIT-NNNNNN.tar` with `shard_images` samples each, the class list and the card."""
    target.mkdir(parents=True)
    shards: dict[str, tarfile.TarFile] = {}
    counts: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()
    with ExitStack() as stack:
        for image in images:
            assert image.file is not None
            split = split_name(image.split)
            number, first = divmod(counts[split], context.config.shard_images)
            if first == 0:
                if split in shards:
                    shards[split].close()
                path = target / f"{split}-{number:06d}.tar"
                shards[split] = stack.enter_context(tarfile.open(path, "w"))
            size = {"width": image.width, "height": image.height}
            labels = {"image_id": image.image_id, **size, **label_columns(image, context)}
            text = json.dumps(labels, ensure_ascii=False).encode()
            for suffix, data in ((image.file.suffix, image.file.data), ("json", text)):
                member = tarfile.TarInfo(f"{counts[split]:08d}.{suffix}")
                member.size = len(data)
                shards[split].addfile(member, io.BytesIO(data))
            counts[split] += 1
            suffixes[image.file.suffix] += 1
    split = min(counts, default="train")
    last = f"{max(counts[split] - 1, 0) // context.config.shard_images:06d}"
    listed = ";".join(suffix for suffix, _ in suffixes.most_common())
    _describe(context, target, "webdataset", split=split, last=last, suffixes=listed)


def split_name(split: str) -> str:
    """Return a split's name as `datasets` allows it: letters, digits and underscores."""
    return re.sub(r"\W+", "_", split, flags=re.ASCII).strip("_") or "all"


def _describe(
    context: Context,
    target: Path,
    use: str,
    configs: Sequence[Mapping[str, Any]] = (),
    **values: str,
) -> None:
    """Write the class list, and the card that `dataset_card` makes of these values."""
    context.class_table.to_csv(target / "classes.csv")
    card = dataset_card(context, use, configs, **values)
    (target / "README.md").write_text(card, encoding="utf-8")


def dataset_card(
    context: Context, use: str, configs: Sequence[Mapping[str, Any]] = (), **values: str
) -> str:
    """Return the card (Markdown under a YAML header) of what `context.tally` has counted.

    `use` names the template that says how to open it, which `values` fill; `configs` is what the
    hub's loader has to know.
    """
    environment = Environment(  # noqa: S701 - Markdown, not HTML
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    origin, settings = context.origin, {}
    if context.is_machine:
        settings = {
            "teacher": origin.teacher or "not recorded",
            "teacher revision": origin.teacher_revision or "not recorded",
            **{name: origin.settings[name] for name in _SETTINGS if name in origin.settings},
        }
    counts = [(context.tally.per_class[c.class_id], c) for c in context.class_table]
    return environment.get_template("card.md.j2").render(
        header=_header(context, configs),
        machine=context.is_machine,
        origin=origin,
        summary=_summary(context),
        settings=settings,
        classes=sorted(counts, key=lambda entry: (-entry[0], entry[1].class_id)),
        use=use,
        **values,
    )


def _header(context: Context, configs: Sequence[Mapping[str, Any]]) -> str:
    creators = ["machine-generated"] if context.is_machine else ["found"]
    if context.is_machine and context.origin.corrected:
        creators.append("expert-generated")
    header: dict[str, Any] = {
        "annotations_creators": creators,
        "task_categories": ["image-classification"],
        "task_ids": ["multi-label-image-classification"],
        "size_categories": [size_category(context.tally.images)],
        "tags": ["hts_ray", *(["pseudo-labels"] if context.is_machine else [])],
    }
    if configs:
        header["configs"] = [dict(config) for config in configs]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True)


def size_category(images: int) -> str:
    """Return the hub's name of a dataset's order of magnitude."""
    return next((name for limit, name in _SIZES if images < limit), "n>1M")


def _summary(context: Context) -> dict[str, Any]:
    tally = context.tally
    rows = {
        "images": tally.images,
        **{f"split {name}": count for name, count in sorted(tally.per_split.items())},
        "positive labels": tally.positives,
        "positive labels an image": f"{tally.positives / max(tally.images, 1):.2f}",
        "undecided labels an image": f"{tally.ignored / max(tally.images, 1):.2f}",
        "classes": len(context.class_table),
        "classes with a positive": tally.classes_with_positive,
    }
    return rows | ({"images left out": tally.reasons()} if tally.bad_images else {})


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|")
