"""The record that all formats are written from."""

from __future__ import annotations

from hts_ray.classes import hico_classes
from hts_ray.exports.records import Context, LabeledImage, Origin, Tally


def test_pseudo_labels_negatives_are_the_rest_and_annotations_only_what_is_listed():
    """Catches unknown classes that an export turns into negatives."""
    table = hico_classes().subset([18, 19, 20])
    machine = LabeledImage("a", "/a.jpg", "train", (18,), ignored_ids=(20,))
    assert machine.negatives(table) == (19,)
    human = LabeledImage("a", "/a.jpg", "train", (18,), negative_ids=())
    assert human.negatives(table) == ()


def test_names_follow_the_ids():
    """Catches positions taken for class ids."""
    context = Context(hico_classes().subset([74, 18]), Origin("annotations"))
    assert context.names_of((18, 74)) == ["ride bicycle", "wash car"]


def test_a_tally_counts_by_class_split_and_reason():
    """Catches a card whose counts are of something else."""
    tally = Tally()
    tally.count(LabeledImage("a", "/a.jpg", "train", (18, 19), ignored_ids=(20,)))
    tally.count(LabeledImage("b", "/b.jpg", "test", (18,)))
    for number in range(7):
        image = LabeledImage(f"c{number}", "", "train", (18,))
        tally.reject(image, "missing", "not there")
    assert (tally.images, tally.positives, tally.ignored) == (2, 3, 1)
    assert tally.per_class == {18: 2, 19: 1}
    assert tally.per_split == {"train": 1, "test": 1}
    assert tally.bad_images == {"missing": 7}
    assert len(tally.examples) == 5
