"""The dataset card."""

from __future__ import annotations

import pytest
import yaml

from hts_ray.classes import ClassTable, HoiClass
from hts_ray.exports.card import dataset_card, size_category
from hts_ray.exports.records import Context, LabeledImage, Origin


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
