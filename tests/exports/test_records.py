"""The record that all formats are written from."""

from __future__ import annotations

import pytest

from hts_ray.classes import hico_classes
from hts_ray.config import ExportConfig
from hts_ray.errors import ConfigError
from hts_ray.exports.records import Context, LabeledImage, Origin, Tally


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


def image_url(uri, prefix, root):
    config = ExportConfig(image_url_prefix=prefix, image_root=root)
    return Context(hico_classes(), Origin("pseudo_labels"), config).url_of(uri)


def test_the_prefix_stands_for_the_root():
    """Catches names with spaces or marks that break an address, and double quoting."""
    prefix = "https://host/x/"
    assert image_url("/d/photos/a b#1.jpg", prefix, "/d/photos/") == (
        "https://host/x/a%20b%231.jpg"
    )
    assert image_url("s3://bucket/p/a%20b.jpg", prefix, "s3://bucket/p") == (
        "https://host/x/a%20b.jpg"
    )
    local = "/data/local-files/?d=photos/"
    assert image_url("/d/photos/sub/a.jpg", local, "/d/photos") == f"{local}sub/a.jpg"
    assert image_url("/anything", None, None) == "/anything"


def test_images_outside_the_root_are_told():
    """Catches an address that is quietly wrong: /d/photos2 is not in /d/photos."""
    with pytest.raises(ConfigError, match=r"export\.image_root"):
        image_url("/d/photos2/a.jpg", "https://host/", "/d/photos")
    with pytest.raises(ConfigError, match=r"set export\.image_root too"):
        image_url("/d/a.jpg", "https://host/", None)
