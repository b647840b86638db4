"""Damaged and hostile inputs: a good result or a reason, never a traceback, a hang or a lie.

`tests/fuzzing.py` tells how a case that failed is run again.
"""

from __future__ import annotations

import io
import math
import pickle
import random
import re
import resource
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from click.testing import CliRunner
from fuzzing import (
    CSV,
    FIRST,
    ROUNDS,
    SECONDS,
    TEXTS,
    Trap,
    corrupted,
    damaged,
    dumped,
    fuzz,
    time_limit,
)
from PIL import Image

from hts_ray.classes import hico_classes, load_class_table
from hts_ray.cli import cli
from hts_ray.config import HtsConfig, ImagesConfig, load_config
from hts_ray.engine.decoding import decode_batch
from hts_ray.errors import UserError
from hts_ray.images.boxes import read_given_boxes
from hts_ray.images.decode import ERROR_KINDS
from hts_ray.images.folder import read_folder
from hts_ray.images.hico import read_anno_table
from hts_ray.images.manifest import open_manifest
from hts_ray.images.prepared import inspect_images
from hts_ray.store.tables import MANIFEST_SCHEMA, write_table

PEAK_GIB = 1.5  # that reading a small hostile file may add to the process


@pytest.fixture(autouse=True)
def _memory_is_bounded() -> Iterator[None]:
    """A small file must not be allowed to ask for all of a machine's memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < PEAK_GIB, f"reading small files took {grown:.1f} GiB more"


# Images


def encoded(form: str, **options: Any) -> bytes:
    rng = np.random.default_rng(7)
    pixels = np.kron(rng.integers(0, 255, (8, 10, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    image = Image.fromarray(pixels)
    if options.pop("palette", False):
        image = image.quantize(32)
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description " * 50
    return encoded("JPEG", exif=exif)


IMAGES = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True, quality=30),
    "exif": turned(),
    "png": encoded("PNG"),
    "palette": encoded("PNG", palette=True),
    "webp": encoded("WEBP"),
}
LIMITS = ImagesConfig.model_validate({"max_pixels": 20_000_000})


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb_png(rng: random.Random) -> tuple[str, bytes]:
    """Return a PNG whose header tells sides that its data do not, or whose text inflates."""
    side = rng.choice((0, 1, 60, 4000, 100_000, 0x7FFFFFFF, 0xFFFFFFFF))
    other = rng.choice((0, 1, 60, 4000, side))
    header = struct.pack(">IIBBBBB", side, other, rng.choice((1, 8, 16, 99)), 2, 0, 0, 0)
    zeros = zlib.compress(bytes(8_000_000), 9)
    chunks = [png_chunk(b"IHDR", header)]
    if rng.random() < 0.5:
        chunks.append(png_chunk(b"zTXt", b"Comment\0\0" + zeros))
    chunks += [png_chunk(b"IDAT", zeros), png_chunk(b"IEND", b"")]
    return f"bomb {side}x{other}", b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def make_image(rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.15:
        return bomb_png(rng)
    name = rng.choice(list(IMAGES))
    what, data = damaged(IMAGES[name], rng)
    return f"{name}, {what}", data


def check_image(path: Path, _: str) -> None:
    """Decode as a stage does: one row out, with pixels or with a reason."""
    table = pa.table({"image_id": ["a"], "uri": [str(path)], "split": ["train"]})
    row = decode_batch(table, LIMITS).to_pylist()[0]
    if row["error_kind"] is None:
        assert len(row["pixels"]) == row["pixel_height"] * row["pixel_width"] * 3
        assert min(row["width"], row["height"]) >= LIMITS.min_side
        return
    assert row["error_kind"] in ERROR_KINDS
    assert row["pixels"] is None
    assert row["error"].strip()


def test_images_decode_or_are_quarantined_with_a_reason(tmp_path):
    """Would catch a decoder's error, bomb or endless loop that ends a run over the web's images."""
    accepted = fuzz("image", 150, tmp_path, "image", make_image, check_image)
    assert accepted == 150 * ROUNDS, "quarantine rows are an answer, not an error"


def test_a_folder_of_damaged_images_loses_none(tmp_path):
    """Would catch an image that is neither in the manifest nor in the quarantine."""
    for number in range(40):
        _, data = make_image(random.Random(f"folder {FIRST + number}"))
        (tmp_path / f"{number}.jpg").write_bytes(data)
    prepared = inspect_images(read_folder(str(tmp_path)))
    ids = [*prepared.manifest["uri"].to_pylist(), *prepared.quarantine["uri"].to_pylist()]
    assert sorted(ids) == sorted(str(path) for path in tmp_path.iterdir())
    assert all(reason.strip() for reason in prepared.quarantine["error"].to_pylist())


# Annotations


def anno_variables() -> dict[str, Any]:
    actions = np.empty((600, 1), dtype=[("nname", object), ("vname", object)])
    actions[:, 0] = [(c.object, c.verb) for c in hico_classes()]
    found: dict[str, Any] = {"list_action": actions}
    for split, count in (("train", 3), ("test", 2)):
        anno = np.full((600, count), np.nan)
        anno[18, 0], anno[19, 0], anno[20, 1] = 1, -1, 0
        files = np.empty((count, 1), dtype=object)
        files[:, 0] = [f"HICO_{split}_{n}.jpg" for n in range(count)]
        found |= {f"list_{split}": files, f"anno_{split}": anno}
    return found


def mat(variables: dict[str, Any], compress: bool) -> bytes:
    stream = io.BytesIO()
    scipy.io.savemat(stream, variables, do_compression=compress)
    return stream.getvalue()


def wrong_variables(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return HICO's variables with one of them of another type, shape or content."""
    found = anno_variables()
    name = rng.choice(list(found))
    value = found[name]
    wrong = {
        "nothing": np.zeros((0, 0)),
        "text": "nan",
        "number": 3.0,
        "complex": np.full(value.shape, 1j),
        "integers": np.zeros(value.shape, np.int8),
        "nan": np.full(value.shape, np.nan),
        "infinite": np.full(value.shape, np.inf),
        "turned": value.T,
        "doubled": np.concatenate([value, value]),
        "cut": value[:-1],
        "unicode": np.full(value.shape, "\u202e\u00e9", dtype=object),
        "struct": {"a": 1.0},
        "logical": np.ones(value.shape, bool),
    }
    kind = rng.choice([*wrong, "missing"])
    if kind == "missing":
        del found[name]
    else:
        found[name] = wrong[kind]
    return f"{name} {kind}", found


def test_annotations_are_read_whole_or_refused(tmp_path):
    """Would catch scipy's own errors, labels without a meaning, and images that vanish."""
    whole = {compress: mat(anno_variables(), compress) for compress in (False, True)}

    def make(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.35:
            what, variables = wrong_variables(rng)
            return what, mat(variables, compress=False)
        return damaged(whole[rng.random() < 0.3], rng)

    def check(path: Path, what: str) -> None:
        table = read_anno_table(str(path))
        assert table.schema.equals(MANIFEST_SCHEMA)
        table.validate(full=True)
        assert len(set(table["image_id"].to_pylist())) == len(table) > 0
        for row in table.to_pylist():
            ids = row["positive_ids"] + row["negative_ids"] + row["ambiguous_ids"]
            assert len(set(ids)) == len(ids)
            assert all(1 <= class_id <= 600 for class_id in ids)
        if "missing" not in what and "truncate" not in what:
            assert len(table) == 5, "images were lost without a word"

    assert fuzz("anno", 70, tmp_path, "anno.mat", make, check) > 0


# Manifests


def manifest_table(rows: int = 60) -> pa.Table:
    lists = pa.array([[n % 600, 3] if n % 3 else None for n in range(rows)], pa.list_(pa.int16()))
    columns = {
        "image_id": [f"image {n}" for n in range(rows)],
        "uri": [f"/images/\u00e9{n}.jpg" for n in range(rows)],
        "width": [640] * rows,
        "height": [480] * rows,
        "split": ["train" if n % 4 else "test" for n in range(rows)],
        "positive_ids": lists,
        "negative_ids": lists,
        "ambiguous_ids": lists,
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def wrong_table(rng: random.Random) -> tuple[str, pa.Table]:
    """Return a manifest with a column that is missing, null, repeated or of another type."""
    table = manifest_table()
    place = rng.randrange(table.num_columns)
    name, rows = table.column_names[place], len(table)
    wrong = {
        "null": pa.nulls(rows, table.schema.field(name).type),
        "some null": pa.array([None, *table[name].to_pylist()[1:]], table.schema.field(name).type),
        "nan": pa.array([math.nan] * rows),
        "integers": pa.array(range(rows)),
        "huge": pa.array([1 << 60] * rows),
        "repeated": pa.array(["a"] * rows),
        "bytes": pa.array([b"\xff\xfe"] * rows),
        "structs": pa.array([{"a": 1}] * rows),
        "texts": pa.array([["\u202e"]] * rows),
        "negative": pa.array([[-5, 40_000]] * rows),
    }
    kind = rng.choice([*wrong, "missing", "empty", "doubled"])
    if kind == "missing":
        return f"{name} {kind}", table.drop_columns([name])
    if kind == "empty":
        return kind, table.slice(0, 0)
    if kind == "doubled":
        return kind, pa.concat_tables([table, table])
    return f"{name} {kind}", table.set_column(place, name, wrong[kind])


def test_manifests_keep_all_their_rows_or_are_refused(tmp_path):
    """Would catch damaged pages read as data, rows that vanish, and Arrow's own errors."""
    write_table(str(tmp_path / "whole"), manifest_table())
    whole = (tmp_path / "whole").read_bytes()
    expected = manifest_table().to_pylist()

    def make(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.4:
            what, table = wrong_table(rng)
            stream = io.BytesIO()
            pq.write_table(table, stream)
            return f"wrong {what}", stream.getvalue()
        return damaged(whole, rng)

    def check(path: Path, what: str) -> None:
        table = open_manifest(str(path)).table
        assert table.schema.equals(MANIFEST_SCHEMA)
        rows = table.to_pylist()
        if not what.startswith("wrong"):
            assert rows == expected, "damaged data were taken for good"
        for name in ("image_id", "uri", "split"):
            assert all(row[name] for row in rows), f"an empty {name}"
        assert len(rows) == pq.read_metadata(path).num_rows
        chosen = [
            open_manifest(str(path)).rows((split,)) for split in {row["split"] for row in rows}
        ]
        assert sum(map(len, chosen)) == len(rows)

    assert fuzz("manifest", 100, tmp_path, "manifest.parquet", make, check) > 0


def test_stages_refuse_what_the_manifest_reader_refuses(tmp_path):
    """Would catch a stage that reads single columns, and meets there what nobody checked."""

    def make(rng: random.Random) -> tuple[str, bytes]:
        what, table = wrong_table(rng)
        stream = io.BytesIO()
        pq.write_table(table, stream)
        return what, stream.getvalue()

    def check(path: Path, _: str) -> None:
        rows = open_manifest(str(path)).rows(("train", "test")).to_pylist()
        assert len(rows) == pq.read_metadata(path).num_rows
        assert all(isinstance(row["image_id"], str) for row in rows)

    assert fuzz("stage", 40, tmp_path, "manifest.parquet", make, check) > 0


# Classes and settings


def damaged_text(text: str, rng: random.Random) -> tuple[str, bytes]:
    """Return a text whose bytes are damaged, or one of whose words or lines is another."""
    if rng.random() < 0.4:
        return damaged(text.encode(), rng)
    other = rng.choice(TEXTS)
    if rng.random() < 0.6:
        words = list(re.finditer(r"[^\s,:\[\]]+", text))
        word = rng.choice(words)
        changed = text[: word.start()] + other + text[word.end() :]
        what = f"{word[0]!r} is {other[:20]!r}"
    else:
        lines = text.splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), rng.choice((*lines, other + "\n")))
        changed, what = "".join(lines), f"a line more, perhaps {other[:20]!r}"
    return what, changed.encode("utf-8", "surrogatepass")


def test_class_lists_are_read_or_refused(tmp_path):
    """Would catch classes without a prompt, two with one id, and the csv module's own errors."""

    def check(path: Path, _: str) -> None:
        table = load_class_table(str(path))
        assert len(table) > 0
        assert len(set(table.ids.tolist())) == len(table)
        for item in table:
            assert item.name.strip()
            assert all(prompt.strip() for prompt in item.prompts)

    accepted = fuzz(
        "classes", 70, tmp_path, "classes.csv", lambda rng: damaged_text(CSV, rng), check
    )
    assert accepted > 0


def test_settings_are_read_or_refused(tmp_path):
    """Would catch YAML's dates, numbers and loops ending in a traceback, or never."""
    text = HtsConfig.model_validate({}).to_yaml()
    special = [
        "seed: &a [*a]", "? [1, 2]\n: 3", "1: 2", "null: 1",
        "seed: 2020-13-45", "seed: " + "9" * 5000, "[" * 5000, "{a: " * 2000, "seed: 1:99999999:99",
        "- a\n- b", "!!python/object/apply:os.getcwd []", "filter: {1: 2}", "filter: {[a]: 2}",
        "filter: {null: 2}", "train: {optim: {lr: .nan}}", "train: {optim: 1e400}", "<<: [1]",
        "filter: 2020-01-01", "seed: !!binary AAAA", "run_dir: !!set {a}", "seed: 0b1\x00",
        "\ufeffseed: 1",
    ]  # fmt: skip

    def make(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.4:
            chosen = rng.choice(special)
            return chosen[:30], chosen.encode()
        return damaged_text(text, rng)

    def check(path: Path, _: str) -> None:
        config = load_config(file=str(path))
        assert isinstance(config, HtsConfig)
        path.write_text(config.to_yaml())
        assert load_config(file=str(path)) == config

    assert fuzz("settings", 100, tmp_path, "config.yaml", make, check) > 0


# Box files

COCO = {
    "images": [
        {"id": n, "file_name": f"train/{n}.jpg", "width": 100, "height": 80} for n in range(4)
    ],
    "annotations": [
        {"id": n, "image_id": n % 4, "category_id": 1 + n % 2, "bbox": [n, 5, 20, 30], "score": 0.5}
        for n in range(8)
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "hot_dog"}],
}
HICODET = {
    "filenames": ["0.jpg", "1.jpg"],
    "size": [[100, 80], [100, 80]],
    "objects": ["bicycle", "cup"],
    "annotation": [
        {"boxes_h": [[1, 2, 30, 40]], "boxes_o": [[5, 6, 60, 70]], "object": [n], "verb": [3]}
        for n in range(2)
    ],
}
LISTED = [
    {"file_name": f"{n}.jpg", "annotations": [{"bbox": [1, 2, 30, 40], "category_id": 1}],
     "hoi_annotation": []}
    for n in range(3)
]  # fmt: skip


def box_parquet() -> bytes:
    boxes = [[[1.0, 2.0, 30.0, 40.0], [3.0, 3.0, 9.0, 9.0]] for _ in range(4)]
    table = pa.table(
        {
            "image_id": [str(n) for n in range(4)],
            "boxes": boxes,
            "labels": [["person", "cup"]] * 4,
            "scores": [[0.5, 0.75]] * 4,
        }
    )
    stream = io.BytesIO()
    pq.write_table(table, stream)
    return stream.getvalue()


def test_box_files_give_boxes_inside_their_images_or_are_refused(tmp_path):
    """Would catch boxes that are none, infinite numbers, and files whose layout is a surprise."""
    parquet = box_parquet()

    def make(rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.2:
            return damaged(parquet, rng)
        layout = rng.choice((COCO, HICODET, LISTED))
        if rng.random() < 0.3:
            return damaged(dumped(layout), rng)
        for _ in range(rng.choice((1, 1, 4))):
            layout = corrupted(layout, rng) if isinstance(layout, dict | list) else layout
        try:
            return "other values", dumped(layout)
        except (ValueError, RecursionError):
            return "text", b"{"

    def check(path: Path, _: str) -> None:
        boxes = read_given_boxes(str(path))
        assert len(boxes) > 0
        for n in range(4):
            found = boxes.of(str(n), f"/images/train/{n}.jpg", 100, 80)
            for box in [*found.boxes, *(detection.box for detection in found.detections)]:
                assert all(map(math.isfinite, box))
                assert 0 <= box[0] < box[2] <= 100
                assert 0 <= box[1] < box[3] <= 80
            assert all(0 <= detection.score <= 1 for detection in found.detections)
            assert all(problem.strip() for problem in found.problems)

    assert fuzz("boxes", 100, tmp_path, "boxes.json", make, check) > 0


# Pickles


def test_the_trap_works(tmp_path):
    """Would catch a trap that catches nobody, and so proves nothing below."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (read_anno_table, "Python pickle, which runs code"),
        (read_given_boxes, "Python pickle, which runs code"),
        (open_manifest, "cannot be read as Parquet"),
        (load_class_table, "not UTF-8"),
        (lambda path: load_config(file=path), "not readable as YAML"),
    ],
)
def test_pickles_are_refused_and_not_run(tmp_path, read, reason):
    """Would catch code in somebody's file that runs when the file is read."""
    trap, path = Trap(tmp_path / "sprung"), tmp_path / "file.parquet"
    path.write_bytes(pickle.dumps(trap))
    with pytest.raises(UserError, match=reason):
        read(str(path))
    path.write_text(f"run_dir: !!python/object/apply:os.mkdir ['{trap.target}']\n")
    with pytest.raises(UserError):
        read(str(path))
    assert not trap.target.exists()


# The command line


def test_commands_end_with_a_message(tmp_path):
    """Would catch a way around the readers above: a traceback where a user sees one."""
    commands = {
        "classes.csv": ["prepare", "folder", "--root", "IMAGES", "classes.source=FILE"],
        "config.yaml": ["train", "--config", "FILE", "--dry-run"],
        "manifest.parquet": ["evaluate", "--predictions", "SCORES", "--annotations", "FILE"],
        "anno.mat": ["evaluate", "--predictions", "SCORES", "--annotations", "FILE"],
    }
    write_table(str(tmp_path / "good"), manifest_table())
    whole = {
        "classes.csv": CSV.encode(),
        "config.yaml": HtsConfig.model_validate({}).to_yaml().encode(),
        "manifest.parquet": (tmp_path / "good").read_bytes(),
        "anno.mat": mat(anno_variables(), compress=True),
    }
    ids = ["image 0", "image 4", "HICO_test_0"]
    scores = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(1800, np.float32)), 600)
    write_table(str(tmp_path / "scores"), pa.table({"image_id": ids, "scores": scores}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(IMAGES["jpeg"])
    failures, done = [], 0
    for number in range(FIRST, FIRST + 40 * ROUNDS):
        rng = random.Random(f"command {number}")
        name = list(commands)[number % len(commands)]
        what, data = damaged(whole[name], rng) if number % 10 else ("nothing", whole[name])
        (tmp_path / name).write_bytes(data)
        places = {"FILE": tmp_path / name, "IMAGES": tmp_path / "images"}
        places["SCORES"] = tmp_path / "scores"
        words = [re.sub("[A-Z]{4,}", lambda found: str(places[found[0]]), w)  # noqa: B023
                 for w in commands[name]]  # fmt: skip
        with time_limit(SECONDS):
            result = CliRunner().invoke(cli, [*words, "--run-dir", str(tmp_path / f"{number}")])
        done += result.exit_code == 0
        if result.exception and not isinstance(result.exception, UserError | SystemExit):
            failures.append(f"{number} {words[0]} ({what}): {result.exception!r}")
        elif result.exit_code and not (str(result.exception).strip() or result.output.strip()):
            failures.append(f"{number} {words[0]} ({what}): ended without a word")
    assert not failures, "\n".join(failures[:10])
    assert done, "what is not damaged is read"
