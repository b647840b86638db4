"""Reading and naming image files."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hts_ray.exports.image_files import FileNames, image_suffix, with_files
from hts_ray.exports.records import LabeledImage, Tally


@given(st.lists(st.text(max_size=12), max_size=40))
def test_names_are_unique_plain_and_stay_in_their_folder(image_ids):
    """Catches an id such as `../x` that leaves the export, and two images that share a file."""
    names = FileNames()
    made = [names.of(image_id, "jpg") for image_id in image_ids]
    assert len({name.casefold() for name in made}) == len(made)
    for name in made:
        assert name.endswith(".jpg")
        assert "/" not in name
        assert not name.startswith((".", "-"))
        assert name.count(".") == 1  # WebDataset's keys end at the first dot


class Counting(set):
    """A set that counts how often it is asked for a name."""

    asked = 0

    def __contains__(self, name):
        self.asked += 1
        return super().__contains__(name)


@pytest.mark.parametrize("number", [100, 1000])
def test_a_free_name_is_found_without_starting_over(number):
    """Catches a search that tries all taken names again for each of the images that share one."""
    names = FileNames()
    names._taken = asked = Counting()
    made = {names.of(f"{folder}/0.jpg", "jpg") for folder in range(number)}
    assert len(made) == number
    assert asked.asked < 3 * number


@pytest.mark.parametrize(
    ("form", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")]
)
def test_the_suffix_tells_the_content_and_not_the_old_name(form, suffix):
    """Catches a PNG called .jpg, which strict readers refuse."""
    sink = io.BytesIO()
    Image.new("RGB", (9, 9)).save(sink, form)
    assert image_suffix(sink.getvalue()) == suffix


def images(tmp_path):
    good, text = tmp_path / "good.jpg", tmp_path / "text.jpg"
    Image.new("RGB", (30, 20)).save(good)
    text.write_text("no image")
    for number, path in zip(count(), (good, tmp_path / "none.jpg", text, good), strict=False):
        yield LabeledImage(f"i{number}", str(path), "train", (18,), width=7, height=7)


def test_what_is_no_image_is_counted_and_the_rest_goes_on(tmp_path):
    """Catches an export that fails at one lost file, or keeps a size that is not the file's."""
    for needs in ("labels", "sizes", "files"):
        tally = Tally()
        found = list(with_files(images(tmp_path), needs, tally, 2))
        assert [(i.image_id, i.width, i.height) for i in found] == [("i0", 30, 20), ("i3", 30, 20)]
        assert tally.bad_images == {"missing": 1, "not_an_image": 1}
        assert tally.images == 2
    assert found[0].file.data == (tmp_path / "good.jpg").read_bytes()


def test_known_sizes_are_trusted_when_asked(tmp_path):
    """Catches a storage that is asked a million times although the manifest knows the sizes."""
    tally = Tally()
    found = list(with_files(images(tmp_path), "sizes", tally, 2, check=False))
    assert [i.width for i in found] == [7] * 4
    assert not tally.bad_images
    unknown = [replace(image, width=None) for image in images(tmp_path)]
    found = list(with_files(unknown, "sizes", tally, 2, check=False))
    assert [i.width for i in found] == [30, 30]
