"""Tar and Parquet shards: images are read where they lie, and damage costs what it hits."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hts_ray.config import ImagesConfig, PrepareConfig
from hts_ray.engine.decoding import decode_batch
from hts_ray.errors import ConfigError, DataError
from hts_ray.images import inside
from hts_ray.images.decode import ImageError
from hts_ray.images.prepared import Prepared, inspect_images
from hts_ray.images.retry import read_image_bytes, read_neighbours
from hts_ray.images.shards import find_shards, read_shards, split_of

CONFIG = PrepareConfig(workers=2)


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_images(path: Path, values: list[bytes | None], group: int = 3) -> Path:
    structs = [None if v is None else {"bytes": v, "path": "x.jpg"} for v in values]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(structs, kind), "label": list(range(len(values)))})
    pq.write_table(table, path, row_group_size=group)
    return path


def prepared(kind: str, root: object, **settings: object) -> Prepared:
    config = PrepareConfig(workers=2, **settings)
    found = read_shards(kind, str(root), config)
    return inspect_images(found, headers=config.headers, workers=2)


def rows(result: Prepared) -> dict[str, str]:
    return dict(zip(*(result.manifest[n].to_pylist() for n in ("image_id", "uri")), strict=True))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_image_of_a_tar_is_read_where_it_lies(tmp_path, kind):
    """Catches offsets that are off by a header, in each of tar's formats and with long names."""
    long = "d" * 90 + "/" + "é" * 20
    images = {f"a/{n:03d}.jpg": jpeg(n) for n in range(5)} | {f"{long}.jpg": jpeg(9)}
    members = {"notes.txt": b"x", **images, "a/000.json": b"{}", "._a.jpg": b"junk"}
    write_tar(tmp_path / "train-000.tar", members, kind)
    found = prepared("webdataset", tmp_path)
    assert {i: read_image_bytes(u) for i, u in rows(found).items()} == {
        f"train-000/{name.removesuffix('.jpg')}": data for name, data in images.items()
    }
    assert found.manifest["width"].to_pylist() == [40] * 6
    assert found.counts["other_members"] == 3
    assert found.counts["shards"] == 1


def test_unopened_images_have_no_size(tmp_path):
    """Catches `headers=false` that opens images all the same, or finds others."""
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "2.jpg": b"no image"})
    write_images(tmp_path / "a.parquet", [jpeg(1), b"no image"])
    for kind in ("webdataset", "parquet"):
        found = prepared(kind, tmp_path, headers=False)
        assert found.manifest["width"].to_pylist() == [None, None]
        assert len(prepared(kind, tmp_path).manifest) == 1


def test_damage_in_a_tar_costs_what_it_hits(tmp_path):
    """Catches a run that is lost to one cut shard, and images that share a key unseen."""
    good = {f"{n}.jpg": jpeg(n) for n in range(4)}
    whole = write_tar(tmp_path / "a-000.tar", good)
    data = whole.read_bytes()
    (tmp_path / "a-001.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "a-002.tar").write_bytes(b"this is no tar file at all" * 100)
    members = {"x.jpg": jpeg(1), "x.png": jpeg(2), "bad.jpg": b"no image", "none.jpg": b""}
    write_tar(tmp_path / "a-003.tar", members)
    found = prepared("webdataset", f"{tmp_path}/a-{{000..004}}.tar")
    assert [i for i in rows(found) if i.startswith(("a-000", "a-003"))] == [
        *(f"a-000/{n}" for n in range(4)),
        "a-003/x",
    ]
    assert 0 < sum(i.startswith("a-001/") for i in rows(found)) < 4
    bad = {r["image_id"]: r["error_kind"] for r in found.quarantine.to_pylist()}
    assert bad == {
        "a-001": "truncated",
        "a-002": "truncated",
        "a-003/x.png": "unreadable",
        "a-003/bad": "not_an_image",
        "a-003/none": "empty",
        "a-004": "missing",
    }


def test_cells_of_parquet_shards(tmp_path):
    """Catches rows that shift at a row group's edge, and nulls that stop a file."""
    images = [jpeg(n) for n in range(7)]
    write_images(tmp_path / "test-00000-of-00001.parquet", [*images, None])
    found = prepared("parquet", tmp_path)
    assert [read_image_bytes(uri) for uri in rows(found).values()] == images
    assert set(found.manifest["split"].to_pylist()) == {"test"}
    assert found.quarantine["error_kind"].to_pylist() == ["empty"]
    # A plain binary column, found or named.
    table = pa.table({"jpg": images, "mask": images})
    pq.write_table(table, tmp_path / "two.parquet")
    with pytest.raises(DataError, match=r"2 columns.*prepare\.column"):
        prepared("parquet", tmp_path / "two.parquet")
    named = prepared("parquet", tmp_path / "two.parquet", column="jpg")
    assert [read_image_bytes(uri) for uri in rows(named).values()] == images
    pq.write_table(pa.table({"uri": ["a"]}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match="no column with images' bytes"):
        prepared("parquet", tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"prepare\.column=uri holds no bytes"):
        prepared("parquet", tmp_path / "list.parquet", column="uri")


def test_what_cannot_be_prepared_is_named(tmp_path):
    """Catches shards that are silently left out."""
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="compressed"):
        find_shards(str(tmp_path), ".tar")
    with pytest.raises(DataError, match=r"holds no \.parquet"):
        find_shards(str(tmp_path), ".parquet")
    with pytest.raises(ConfigError, match="smaller number first"):
        find_shards(f"{tmp_path}/{{9..1}}.tar", ".tar")


def test_shards_of_one_name_keep_their_folder(tmp_path):
    """Catches ids of two folders' shards that collide."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "000.tar", {"1.jpg": jpeg(1)})
    found = prepared("webdataset", tmp_path)
    assert list(rows(found)) == ["train/000/1", "val/000/1"]
    assert found.manifest["split"].to_pylist() == ["train", "validation"]


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("s3://b/imagenet-train-{0}.tar", "train"),
        ("data/test-00000-of-00002.parquet", "test"),
        ("x/validation/0.tar", "validation"),
        ("x/training0.tar", "train"),
        ("x/latest-0.tar", "own"),
        ("x/trained.tar", "own"),
    ],
)
def test_split_of_a_name(path, split):
    """Catches a split that is read out of another word."""
    assert split_of(path, "own") == split


def test_neighbours_are_read_by_one_request(tmp_path, monkeypatch):
    """Catches a request an image, and far shards read whole."""
    images = {f"{n}.jpg": jpeg(n) for n in range(6)}
    members = {**dict(list(images.items())[:4]), "movie.bin": bytes(1 << 20)}
    write_tar(tmp_path / "a.tar", members | dict(list(images.items())[4:]))
    uris = list(rows(prepared("webdataset", tmp_path)).values())
    reads: list[int] = []
    plain = inside.Span.read

    def counted(self: inside.Span, most: int | None = None) -> bytes:
        reads.append(self.length)
        return plain(self, most)

    monkeypatch.setattr(inside.Span, "read", counted)
    assert list(read_neighbours([*uris[::-1], uris[0]]).values()) == list(images.values())
    assert len(reads) == 2
    assert max(reads) < 1 << 20


def test_a_batch_from_shards_decodes_as_from_files(tmp_path):
    """Catches pixels of another row, and a batch that is lost with a shard that vanished."""
    write_tar(tmp_path / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(3)})
    write_images(tmp_path / "b.parquet", [jpeg(n) for n in range(3, 6)])
    uris = [*rows(prepared("webdataset", tmp_path)).values()]
    uris += rows(prepared("parquet", tmp_path)).values()
    table = pa.table({"image_id": [str(n) for n in range(6)], "uri": uris})
    decoded = decode_batch(table, ImagesConfig())
    for n, pixels in enumerate(decoded["pixels"].to_pylist()):
        expected = np.asarray(Image.open(io.BytesIO(jpeg(n))).convert("RGB"))
        assert pixels == expected.tobytes()
    (tmp_path / "a.tar").unlink()
    kinds = decode_batch(table, ImagesConfig())["error_kind"].to_pylist()
    assert kinds == ["missing"] * 3 + [None] * 3
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg(0)})  # shorter than it was
    kinds = decode_batch(table, ImagesConfig())["error_kind"].to_pylist()
    assert kinds[:2] == [None, "not_an_image"]
    with pytest.raises(ImageError, match="row groups"):
        read_image_bytes(f"{tmp_path}/b.parquet#image.bytes=7,0")
