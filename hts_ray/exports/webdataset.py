"""WebDataset shards: tar files in which an image and its labels share a key.

Sample N of a split is `NNNNNNNN.jpg` (or the image's own suffix) and `NNNNNNNN.json`. The bytes are
those of the source. Tar headers carry no time and no user, so the same labels give the same files.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hts_ray.exports.card import CARD, dataset_card
from hts_ray.exports.huggingface import CLASSES, split_name
from hts_ray.exports.records import Context, ImageFile, LabeledImage
from hts_ray.exports.tables import label_columns


def write_webdataset(images: Iterable[LabeledImage], context: Context, target: Path) -> None:
    """Write `SPLIT-NNNNNN.tar` with `shard_images` samples each, the class list and the card."""
    target.mkdir(parents=True)
    shards: dict[str, tarfile.TarFile] = {}
    counts: Counter[str] = Counter()
    suffixes: Counter[str] = Counter()
    try:
        for image in images:
            assert image.file is not None
            split = split_name(image.split)
            number, first = divmod(counts[split], context.shard_images)
            if first == 0:
                if split in shards:
                    shards[split].close()
                path = target / f"{split}-{number:06d}.tar"
                shards[split] = tarfile.open(path, "w")  # noqa: SIM115 - splits may be mixed
            _add_sample(shards[split], f"{counts[split]:08d}", image, image.file, context)
            counts[split] += 1
            suffixes[image.file.suffix] += 1
    finally:
        for shard in shards.values():
            shard.close()
    context.class_table.to_csv(target / CLASSES)
    split = min(counts, default="train")
    card = dataset_card(
        context,
        "webdataset",
        split=split,
        last=f"{max(counts[split] - 1, 0) // context.shard_images:06d}",
        suffixes=";".join(suffix for suffix, _ in suffixes.most_common()),
    )
    (target / CARD).write_text(card, encoding="utf-8")


def _add_sample(
    shard: tarfile.TarFile, key: str, image: LabeledImage, file: ImageFile, context: Context
) -> None:
    labels = {
        "image_id": image.image_id,
        "width": image.width,
        "height": image.height,
        **label_columns(image, context),
    }
    text = json.dumps(labels, ensure_ascii=False).encode()
    for suffix, data in ((file.suffix, file.data), ("json", text)):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        shard.addfile(member, io.BytesIO(data))
