"""The image folder, as `datasets` opens it."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from labeled_run import POSITIVES, SIZE
from PIL import Image

from hts_ray.exports.huggingface import split_name
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels


@pytest.fixture(scope="module")
def folder(labeled, tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "dataset"
    export_labels(labeled, read_labels(labeled), "huggingface", str(target))
    return target


def test_datasets_opens_it(folder, labeled, tmp_path):
    """Catches a layout, a column type or a file name that the hub's own loader refuses."""
    import datasets

    dataset = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert set(dataset) == {"train"}
    rows = {row["image_id"]: row for row in dataset["train"]}
    assert {i: sorted(row["class_ids"]) for i, row in rows.items()} == {
        i: ids for i, ids in POSITIVES.items() if i != "gone"
    }
    assert rows["a/2"]["labels"] == ["ride bicycle", "sit on bicycle"]
    assert rows["b/2"]["ignored"] == ["ride bicycle"]
    assert rows["a/2"]["probability"] == pytest.approx([0.9, 0.9])
    assert rows["b/3"]["labels"] == []
    uri = next(i.uri for i in read_labels(labeled).images() if i.image_id == "a/2")
    with Image.open(uri) as original:
        assert rows["a/2"]["image"].size == SIZE
        assert np.array_equal(np.asarray(rows["a/2"]["image"]), np.asarray(original))


def test_the_card_tells_counts_teacher_settings_and_what_is_left_to_do(folder):
    """Catches machine labels that are passed on as truth, and a licence that nobody gave."""
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["annotations_creators"] == ["machine-generated"]
    assert header["task_ids"] == ["multi-label-image-classification"]
    assert header["size_categories"] == ["n<1K"]
    assert "license" not in header
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "train/**"}]
    for words in (
        "| images | 5 |",
        "| images left out | missing 1 |",
        "| 18 | ride bicycle | 2 |",
        "| teacher | Some/captioner |",
        "| teacher revision | 0123abc |",
        "| positive_threshold | 0.5 |",
        "| settings hash |",
        "No human label was used",
        "## Licences",
        "fill in",
    ):
        assert words in card, words


def test_a_card_of_annotations_claims_no_machine(labeled, tmp_path):
    """Catches human labels that are called a model's guesses."""
    target = tmp_path / "truth"
    export_labels(labeled, read_labels(labeled, manifest=""), "huggingface", str(target))
    card = (target / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["annotations_creators"] == ["found"]
    assert "teacher" not in card.split("## Licences")[0]
    assert "| every other class | unknown |" in card


def test_split_names_are_those_that_datasets_takes():
    """Catches a split such as `train/2015`, on which the loader fails."""
    assert split_name("train/2015-x") == "train_2015_x"
    assert split_name("--") == "all"
