"""Shards, as the `webdataset` library reads them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from labeled_run import POSITIVES, SIZE

from hts_ray.config import override
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels


@pytest.fixture(scope="module")
def folder(labeled, tmp_path_factory):
    target = tmp_path_factory.mktemp("shards") / "dataset"
    config = override(labeled.config, {"export": {"shard_images": 2}})
    export_labels(replace(labeled, config=config), read_labels(labeled), "webdataset", str(target))
    return target


def test_the_library_reads_every_sample(folder):
    """Catches keys that the library splits elsewhere, and shards that lose their last samples."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("train-*.tar"))
    assert [path.rsplit("/", 1)[-1] for path in shards] == [
        "train-000000.tar", "train-000001.tar", "train-000002.tar",
    ]  # fmt: skip
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
    samples = list(dataset.to_tuple("jpg;png", "json"))
    assert {labels["image_id"]: sorted(labels["class_ids"]) for _, labels in samples} == {
        i: ids for i, ids in POSITIVES.items() if i != "gone"
    }
    assert all(image.size == SIZE for image, _ in samples)


def test_the_card_s_example_is_right(folder):
    """Catches a range of shards, or a list of suffixes, that leaves samples out."""
    card = (folder / "README.md").read_text()
    assert "train-{000000..000002}.tar" in card
    assert '"jpg;png", "json"' in card


def test_the_same_labels_give_the_same_bytes(folder, labeled, tmp_path):
    """Catches times and users in tar headers, by which every copy would look changed."""
    again = tmp_path / "again"
    config = override(labeled.config, {"export": {"shard_images": 2}})
    export_labels(replace(labeled, config=config), read_labels(labeled), "webdataset", str(again))
    for path in folder.glob("*.tar"):
        assert path.read_bytes() == (again / path.name).read_bytes()
