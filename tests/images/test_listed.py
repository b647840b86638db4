"""Lists of images and datasets of the hub: what others wrote is read as it was meant."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hts_ray.config import PrepareConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.listed import read_huggingface, read_list
from hts_ray.images.prepared import inspect_images
from hts_ray.images.retry import read_image_bytes
from hts_ray.images.stage import prepare_manifest

CONFIG = PrepareConfig(split="mine", workers=2)


def picture(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), color).save(path)
    return path


def images(found) -> list[tuple[str, str, str]]:
    return [(row["image_id"], row["uri"], row["split"]) for row in found.listed.to_pylist()]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_list_in_each_format(tmp_path, kind):
    """Catches ids that become numbers, and relative paths that start at the working directory."""
    path = tmp_path / f"list.{kind}"
    columns = {"image_id": ["007", "8"], "path": ["a b.jpg", "s3://b/x.jpg"], "split": ["", "test"]}
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    elif kind == "jsonl":
        lines = [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
    else:
        comma = "\t" if kind == "tsv" else ","
        lines = [comma.join(columns), *map(comma.join, zip(*columns.values(), strict=True))]
        path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert images(read_list(str(path), CONFIG)) == [
        ("007", str(tmp_path / "a b.jpg"), "mine"),
        ("8", "s3://b/x.jpg", "test"),
    ]


def test_a_list_of_paths_alone(tmp_path):
    """Catches ids that must be given, repeats that stop a run, annotations that are lost."""
    path = tmp_path / "list.csv"
    path.write_text("uri\n/a.jpg\n/b.jpg\n/a.jpg\n")
    found = read_list(str(path), CONFIG)
    assert found.listed["image_id"].to_pylist() == ["/a.jpg", "/b.jpg"]
    assert found.counts["repeated_rows"] == 1
    table = pa.table({"uri": ["/a.jpg"], "positive_ids": [[1, 2]], "negative_ids": [[3]]})
    pq.write_table(table, tmp_path / "t.parquet")
    manifest = inspect_images(read_list(str(tmp_path / "t.parquet"), CONFIG), headers=False)
    assert manifest.manifest["positive_ids"].to_pylist() == [[1, 2]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name\na.jpg\n", "no column of paths"),
        ("image_id,uri\n1,/a\n1,/b\n", "'1' stands for /a and /b"),
        ("image_id,uri\n1,/a\n,/b\n", "image_id is empty in row 2"),
        ("uri\n/a,b\n", "cannot be read as a table"),
    ],
)
def test_a_list_that_cannot_be_read(tmp_path, text, reason):
    """Catches a traceback, or rows that are guessed."""
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_list(str(path), CONFIG)
    with pytest.raises(DataError, match="check the path"):
        read_list(str(tmp_path / "none.csv"), CONFIG)


def test_a_dataset_of_parquet_files(tmp_path):
    """Catches a layout of `datasets` that its own library reads and we do not."""
    paths = [str(picture(tmp_path / "files" / f"{n}.png", c)) for n, c in enumerate(["red", "tan"])]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    embedded = [{"bytes": Path(path).read_bytes(), "path": "x.png"} for path in paths]
    data = datasets.Dataset.from_dict({"image": embedded, "label": [0, 1]}, features=features)
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    data.to_parquet(str(root / "data" / "test-00000-of-00001.parquet"))
    manifest = inspect_images(read_huggingface(str(root), CONFIG)).manifest
    assert set(manifest["split"].to_pylist()) == {"test"}
    read = [read_image_bytes(uri) for uri in manifest["uri"].to_pylist()]
    assert read == [Path(path).read_bytes() for path in paths]
    data.save_to_disk(str(tmp_path / "arrow"))
    with pytest.raises(DataError, match=r"save_to_disk.*to_parquet"):
        read_huggingface(str(tmp_path / "arrow"), CONFIG)


def test_a_plain_image_folder_and_an_unknown_dataset(tmp_path, monkeypatch):
    """Catches splits that are lost, and a hub's traceback."""
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "test" / "cat" / "1.png")
    found = read_huggingface(str(tmp_path), CONFIG)
    assert {(i, s) for i, _, s in images(found)} == {
        ("train/cat/1.png", "train"),
        ("test/cat/1.png", "test"),
    }
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    with pytest.raises(ConfigError, match="no such dataset"):
        read_huggingface("someone/none", CONFIG)
    with pytest.raises(ConfigError, match="source"):
        prepare_manifest(CONFIG, str(tmp_path), "zip", str(tmp_path))
