"""The folders for a hub, as `datasets` and `webdataset` open them, and the dataset card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from labeled_run import POSITIVES, SIZE
from PIL import Image

from hts_ray.classes import ClassTable, HoiClass
from hts_ray.config import PrepareConfig, override
from hts_ray.exports.hub import dataset_card, size_category, split_name
from hts_ray.exports.records import Context, LabeledImage, Origin
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels
from hts_ray.images.retry import read_image_bytes
from hts_ray.images.stage import prepare_manifest


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


def prepared_again(source, root):
    """Return what `hts prepare` finds in an export: bytes by id."""
    manifest = prepare_manifest(PrepareConfig(), str(root) + "-run", source, str(root)).read()
    rows = zip(manifest["image_id"].to_pylist(), manifest["uri"].to_pylist(), strict=True)
    return {image_id: read_image_bytes(uri) for image_id, uri in rows}


def originals(labeled):
    images = read_labels(labeled).images()
    return {i.image_id: Path(i.uri).read_bytes() for i in images if i.image_id != "gone"}


def test_an_image_folder_is_prepared_again(folder, labeled):
    """Catches an export that we cannot read ourselves, or that loses ids."""
    assert prepared_again("huggingface", folder) == originals(labeled)


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


@pytest.fixture(scope="module")
def shards_folder(labeled, tmp_path_factory):
    target = tmp_path_factory.mktemp("shards") / "dataset"
    config = override(labeled.config, {"export": {"shard_images": 2}})
    export_labels(replace(labeled, config=config), read_labels(labeled), "webdataset", str(target))
    return target


def test_the_library_reads_every_sample(shards_folder):
    """Catches keys that the library splits elsewhere, and shards that lose their last samples."""
    import webdataset

    shards = sorted(str(path) for path in shards_folder.glob("train-*.tar"))
    assert [path.rsplit("/", 1)[-1] for path in shards] == [
        "train-000000.tar", "train-000001.tar", "train-000002.tar",
    ]  # fmt: skip
    dataset = webdataset.WebDataset(shards, shardshuffle=False).decode("pil")
    samples = list(dataset.to_tuple("jpg;png", "json"))
    assert {labels["image_id"]: sorted(labels["class_ids"]) for _, labels in samples} == {
        i: ids for i, ids in POSITIVES.items() if i != "gone"
    }
    assert all(image.size == SIZE for image, _ in samples)


def test_shards_are_prepared_again(shards_folder, labeled):
    """Catches samples that are lost between two shards, or read at another's place."""
    found = prepared_again("webdataset", shards_folder)
    assert sorted(found.values()) == sorted(originals(labeled).values())
    assert "train-000002/00000004" in found


def test_the_card_s_example_is_right(shards_folder):
    """Catches a range of shards, or a list of suffixes, that leaves samples out."""
    card = (shards_folder / "README.md").read_text()
    assert "train-{000000..000002}.tar" in card
    assert '"jpg;png", "json"' in card


def test_the_same_labels_give_the_same_bytes(shards_folder, labeled, tmp_path):
    """Catches times and users in tar headers, by which every copy would look changed."""
    again = tmp_path / "again"
    config = override(labeled.config, {"export": {"shard_images": 2}})
    export_labels(replace(labeled, config=config), read_labels(labeled), "webdataset", str(again))
    for path in shards_folder.glob("*.tar"):
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize(
    ("images", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "n>1M"), (1, "n<1K")]
)
def test_size_categories(images, name):
    """Catches a category that the hub does not know or that is one off."""
    assert size_category(images) == name


def test_odd_names_do_not_break_the_table_or_the_header():
    """Catches a class name with a bar, or a split with a colon, that spoils the Markdown."""
    table = ClassTable((HoiClass(0, "a|b: c", None, None, ("a",)),))
    context = Context(table, Origin("pseudo_labels", corrected=3))
    context.tally.count(LabeledImage("x", "/x.jpg", "a: b", (0,)))
    card = dataset_card(context, "huggingface", [{"config_name": "default"}], split="train")
    assert "| 0 | a\\|b: c | 1 |" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["annotations_creators"] == ["machine-generated", "expert-generated"]
    assert "corrected the labels of 3 images" in card
    assert "not recorded" in card  # the teacher
