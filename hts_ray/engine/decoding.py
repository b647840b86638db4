"""The images of a table's rows, decoded in batches: pixels as columns, or why there are none."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hts_ray.config import ImagesConfig
from hts_ray.engine.deaths import KILLED_WORKER, Log, each_in_a_process
from hts_ray.errors import DataError
from hts_ray.images.decode import DecodedImage, ImageError, decode_image
from hts_ray.images.retry import read_image_bytes, read_neighbours
from hts_ray.store import storage
from hts_ray.store.aliases import Pixels

if TYPE_CHECKING:
    from hts_ray.engine.telemetry import Meter

DECODED_FIELDS = (
    pa.field("pixels", pa.large_binary()),
    pa.field("pixel_height", pa.int32()),
    pa.field("pixel_width", pa.int32()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("error_kind", pa.string()),
    pa.field("error", pa.string()),
)
READ_THREADS = 4  # a task's reads overlap; storage is mostly waited for


def decode_batch(
    table: pa.Table,
    images: ImagesConfig,
    square: int | None = None,
    *,
    retries: int = storage.RETRIES,
    attempts: Log | None = None,
    meter: Meter | None = None,
    reader: Reader | None = None,
) -> pa.Table:
    """Add the decoded pixels of each row's `uri`, or the reason why there are none.

    Adds `pixels` (H * W * 3 bytes, RGB, row-major), `pixel_height`, `pixel_width`, the upright
    original's `width` and `height`, `error_kind` and `error`; a bad row has null pixels.
    `square` squashes the pixels to `square` x `square`, which is all that a student looks at.
    Storage that fails is asked again up to `retries` times. With a log of `attempts`, a batch that
    has killed its worker is decoded in another process. A `meter` counts the reads that were tried
    again. A `reader` stands in for the storage. Raises DataError when the storage fails and not an
    image, see `hts_ray.images.retry.read_patiently`.
    """
    uris = table["uri"].to_pylist()
    reader = reader or Reader(retries, meter)
    work = partial(_decode_row, images=images, square=square, reader=reader)
    ids = [f"decode {image_id}" for image_id in table["image_id"].to_pylist()] if attempts else []
    if attempts is not None and attempts.begin(ids) is not None:
        died = {"error_kind": KILLED_WORKER, "error": "the process that decoded it died"}
        rows = each_in_a_process(work, uris, lambda _: died)
    else:
        reader.read_ahead(filter(None, uris))
        with ThreadPoolExecutor(min(READ_THREADS, max(1, len(uris)))) as threads:
            rows = list(threads.map(work, uris))
    if attempts is not None:
        attempts.end(ids)
    for column in DECODED_FIELDS:
        if column.name in table.column_names:  # a manifest may know the size already
            table = table.drop_columns([column.name])
        values = pa.array([row.get(column.name) for row in rows], column.type)
        table = table.append_column(column, values)
    return table


@dataclass
class Reader:
    """Reads images' bytes: those that lie together in a shard ahead, by few requests.

    Storage that fails is asked again up to `retries` times, which a `meter` counts.
    """

    retries: int
    meter: Meter | None
    _ahead: dict[str, bytes] = field(default_factory=dict)

    def read_ahead(self, uris: Iterable[str]) -> None:
        """Read what is side by side in shards; `read` hands it out, each image once."""
        self._ahead = read_neighbours(uris, self.retries, self._retried)

    def read(self, uri: str) -> bytes:
        """Return an image's bytes; raises what `read_image_bytes` raises."""
        data = self._ahead.pop(uri, None)
        return read_image_bytes(uri, self.retries, self._retried) if data is None else data

    def _retried(self) -> None:
        if self.meter is not None:
            self.meter.count(retries=1)


def _decode_row(
    uri: str | None, images: ImagesConfig, square: int | None, reader: Reader
) -> dict[str, Any]:
    try:
        if not uri:
            raise ImageError("missing", "the row has no uri")
        image = decode_image(
            reader.read(uri),
            max_pixels=images.max_pixels,
            min_side=images.min_side,
            max_side=images.max_side,
        )
    except ImageError as error:
        return {"error_kind": error.kind, "error": str(error)[:500]}
    except DataError:
        raise  # the storage is down: no image is bad for that
    except Exception as error:  # one image must not cost a block, whatever a decoder throws
        return {"error_kind": "decode_error", "error": f"{type(error).__name__}: {error}"[:500]}
    pixels = image.pixels if square is None else squash(image.pixels, square)
    return {
        "pixels": pixels.tobytes(),
        "pixel_height": pixels.shape[0],
        "pixel_width": pixels.shape[1],
        "width": image.width,
        "height": image.height,
    }


def decoded_image(batch: pa.Table, row: int) -> DecodedImage:
    """Return the pixels of a row of `decode_batch`, a view."""
    height, width = batch["pixel_height"][row].as_py(), batch["pixel_width"][row].as_py()
    pixels = np.frombuffer(batch["pixels"][row].as_buffer(), dtype=np.uint8)
    return DecodedImage(
        pixels=pixels.reshape(height, width, 3),
        width=batch["width"][row].as_py(),
        height=batch["height"][row].as_py(),
    )


def squash(pixels: Pixels, size: int) -> Pixels:
    """Resize uint8 (H, W, 3) to (size, size, 3) without keeping the aspect, bicubic, antialiased.

    Pillow's kernel, which CLIP was trained with, and which workers have without importing torch.
    """
    from PIL import Image

    if pixels.shape[:2] == (size, size):
        return pixels
    resized = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def stack_pixels(table: pa.Table, size: int) -> Pixels:
    """Return the pixels of rows squashed to `size`, uint8 (N, size, size, 3); none may be null."""
    column = table["pixels"].combine_chunks()
    if len(column) == 0:
        return np.zeros((0, size, size, 3), np.uint8)
    flat = [np.frombuffer(value.as_buffer(), np.uint8) for value in column]
    return np.stack(flat).reshape(len(column), size, size, 3)
