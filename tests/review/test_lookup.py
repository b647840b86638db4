"""Which image and class of a run a file means."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hts_ray.classes import hico_classes
from hts_ray.review.corrected_files import Problem, ReadImage
from hts_ray.review.lookup import ClassNames, ImageIndex

IDS = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "HICO_train2015_00000001"]
URIS = [
    "/d/a/1.jpg",
    "/d/b/1.jpg",
    "s3://bucket/b/2.jpg",
    "/h/train2015/HICO_train2015_00000001.jpg",
]


def find(reference, image_id=None):
    return ImageIndex(IDS, URIS).find(ReadImage(reference, image_id, ()))


def test_images_are_found_by_whatever_a_tool_kept_of_them():
    """Catches paths of other machines, addresses and bare names that lead nowhere."""
    assert find("anything", "b/1.jpg") == 1
    assert find("a/1.jpg") == 0
    assert find("/d/b/1.jpg") == 1
    assert find("/home/me/copy/b/1.jpg") == 1
    assert find("https://host/photos/a/1.jpg") == 0
    assert find("/data/local-files/?d=photos/b/1.jpg") == 1
    assert find("http://host/data/local-files/?d=x%2Fa/1.jpg") == 0
    assert find("2.jpg") == 2
    assert find("C:\\photos\\b\\2.jpg") == 2
    assert find("HICO_train2015_00000001.jpg") == 3


def test_what_could_be_two_images_is_neither():
    """Catches labels that go to the wrong one of two images of the same name."""
    for reference in ("1.jpg", "/other/1.jpg"):
        problem = find(reference)
        assert isinstance(problem, Problem)
        assert problem.kind == "ambiguous_image"
    problem = find("c/3.jpg")
    assert (problem.kind, problem.reference) == ("unknown_image", "c/3.jpg")
    assert "did you mean 'b/2.jpg'" in find("b/2.jpeg").error


@given(st.text(max_size=30))
def test_no_reference_breaks_the_index(reference):
    """Catches an address that the parser of addresses raises on."""
    assert isinstance(find(reference), int | Problem)


def test_class_names_are_forgiven_their_spelling_and_told_their_slips():
    """Catches `Ride_Bicycle` called unknown, and `ride bycicle` without a hint."""
    names = ClassNames(hico_classes())
    ids, unknown = names.find(["Ride_Bicycle", " sit on  bicycle"])
    assert (ids, unknown) == ([18, 19], [])
    ids, unknown = names.find(["ride bycicle", "zzz"])
    assert ids == []
    assert unknown == ["no class 'ride bycicle', did you mean 'ride bicycle'?", "no class 'zzz'"]
