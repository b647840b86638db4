"""From a corrected file to a labeled manifest and overrides: which image and class it means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from labeled_run import IDS

from hts_ray.classes import hico_classes
from hts_ray.errors import ConfigError, DataError
from hts_ray.evaluate import read_annotations
from hts_ray.labels.corrections import read_overrides
from hts_ray.review.corrected_files import Problem, Read, ReadImage, Sample
from hts_ray.review.importing import ClassNames, ImageIndex, import_labels, write_import
from hts_ray.store.tables import MANIFEST_SCHEMA, QUARANTINE_SCHEMA, read_table

FILES = ["a/1.jpg", "b/1.jpg", "b/2.jpg", "HICO_train2015_00000001"]
ADDRESSES = [
    "/d/a/1.jpg",
    "/d/b/1.jpg",
    "s3://bucket/b/2.jpg",
    "/h/train2015/HICO_train2015_00000001.jpg",
]


@pytest.fixture
def manifest(labeled):
    return labeled.manifest().table


def test_what_is_not_marked_is_negative_and_mistakes_are_told(labeled, manifest):
    """Catches a slip in one class name by which that class becomes a negative."""
    read = Read(
        (
            ReadImage("", "b/1", ("wash car",), ambiguous=("Ride Bicycle",)),
            ReadImage("", "a/1", ()),
            ReadImage("", "a/2", ("ride bycicle",)),
            ReadImage("", "a/9", ("wash car",)),
            ReadImage("", "a/1", ("wash car",)),
            ReadImage("", "b/2", ("wash car",), ambiguous=("wash car",)),
        ),
        (Problem("x", "bad_line", "line 9"),),
        {"not_reviewed": 4, "several_annotations": 0},
    )
    done = import_labels(read, manifest, labeled.class_table)
    a, b = done.manifest.to_pylist()
    assert done.manifest.schema.equals(MANIFEST_SCHEMA)
    assert (a["image_id"], a["split"], a["positive_ids"]) == ("a/1", "validation", [])
    assert a["negative_ids"] == IDS
    assert (a["width"], a["uri"][-11:]) == (60, "/images/a/1.jpg"[-11:])
    assert (b["positive_ids"], b["negative_ids"], b["ambiguous_ids"]) == ([74], [19], [18])
    assert done.overrides.to_pylist() == [
        {k: row[k] for k in ("image_id", "positive_ids", "negative_ids", "ambiguous_ids")}
        for row in (a, b)
    ]
    assert done.quarantine.schema.equals(QUARANTINE_SCHEMA)
    kinds = {
        row["image_id"]: (row["error_kind"], row["error"]) for row in done.quarantine.to_pylist()
    }
    assert kinds["a/2"] == (
        "unknown_class",
        "no class 'ride bycicle', did you mean 'ride bicycle'?",
    )
    assert kinds["a/9"][0] == "unknown_image"
    assert "did you mean 'a/" in kinds["a/9"][1] or kinds["a/9"][1]
    assert kinds["a/1"][0] == "repeated_image"
    assert kinds["b/2"][0] == "contradiction"
    assert done.counts == {
        "entries": 7,
        "images": 2,
        "validation_images": 2,
        "override_images": 2,
        "positive_labels": 1,
        "quarantined": 5,
        "bad_line": 1,
        "unknown_class": 1,
        "unknown_image": 1,
        "repeated_image": 1,
        "contradiction": 1,
        "not_reviewed": 4,
    }


def test_a_file_that_lists_negatives_leaves_the_rest_unknown(labeled, manifest):
    """Catches unknown classes of a partial review that become negatives."""
    read = Read((ReadImage("", "a/1", ("wash car",), negative=("ride bicycle",)),))
    (row,) = import_labels(read, manifest, labeled.class_table).manifest.to_pylist()
    assert (row["positive_ids"], row["negative_ids"], row["ambiguous_ids"]) == ([74], [18], [])
    read = Read((ReadImage("", "a/1", ("wash car",)),))
    done = import_labels(read, manifest, labeled.class_table, unmarked="unknown", split="val")
    (row,) = done.manifest.to_pylist()
    assert (row["negative_ids"], row["split"]) == ([], "val")


def test_parts_do_not_share_an_image(labeled, manifest):
    """Catches a student that is validated on images whose corrections it was trained on."""
    read = Read(tuple(ReadImage("", image_id, ()) for image_id in manifest["image_id"].to_pylist()))
    done = import_labels(read, manifest, labeled.class_table, validation_share=0.34, seed=3)
    validation = set(done.manifest["image_id"].to_pylist())
    overrides = set(done.overrides["image_id"].to_pylist())
    assert (len(validation), len(overrides)) == (2, 4)
    assert not validation & overrides
    assert len(done.corrections) == 6
    again = import_labels(read, manifest, labeled.class_table, validation_share=0.34, seed=3)
    assert again.manifest.equals(done.manifest)
    with pytest.raises(ConfigError, match="--validation-share"):
        import_labels(read, manifest, labeled.class_table, validation_share=1.0)


def test_of_a_page_only_drawn_images_validate(labeled, manifest):
    """Catches a validation set of doubtful images, and unticked classes that stay open in full."""
    ids = manifest["image_id"].to_pylist()
    sample = Sample("pseudo_labels-1", (), tuple(ids[:3]), 3)
    images = tuple(
        ReadImage("", name, ("wash car",), negative=("ride bicycle",), full=name in ids[:3])
        for name in ids
    )
    done = import_labels(Read(images, sample=sample), manifest, labeled.class_table)
    assert done.manifest["image_id"].to_pylist() == ids[:3]
    assert done.overrides["negative_ids"].to_pylist() == [[18, 19]] * 3 + [[18]] * 3
    half = import_labels(
        Read(images, sample=sample), manifest, labeled.class_table, validation_share=0.34
    )
    assert len(half.manifest) == 2
    assert {*half.manifest["image_id"].to_pylist()} < {*ids[:3]}
    assert len(half.overrides) == 4
    unknown = import_labels(
        Read(images, sample=sample), manifest, labeled.class_table, unmarked="unknown"
    )
    assert unknown.overrides["negative_ids"].to_pylist() == [[18]] * 6


def test_nothing_usable_is_an_error(labeled, manifest):
    """Catches an import that reports success over a file of another data set."""
    with pytest.raises(DataError, match=r"unknown_image 1.*'zzz'"):
        import_labels(Read((ReadImage("zzz", None, ()),)), manifest, labeled.class_table)
    with pytest.raises(DataError, match="3 images are there, and none was reviewed"):
        import_labels(Read((), counts={"not_reviewed": 3}), manifest, labeled.class_table)


def test_the_folder_serves_as_annotations_and_as_overrides(labeled, manifest, tmp_path):
    """Catches files in the folder that the readers of its tables trip over."""
    read = Read((ReadImage("", "a/1", ("wash car",)), ReadImage("", "nowhere", ())))
    done = import_labels(read, manifest, labeled.class_table)
    output = str(tmp_path / "corrected")
    write_import(done, output, {"agreement.json": {"images": 1}})
    assert len(labeled.manifest(output).table) == 1
    truth = read_annotations(output, labeled.class_table, "validation")
    assert truth.labels().tolist() == [[-1, -1, 1]]
    assert read_overrides(output)["positive_ids"].to_pylist() == [[74]]
    assert len(read_table(f"{output}/quarantine")) == 1
    with pytest.raises(ConfigError, match="already"):
        write_import(done, output)
    write_import(done, output, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["corrected"]


def find(reference, image_id=None):
    return ImageIndex(FILES, ADDRESSES).find(ReadImage(reference, image_id, ()))


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
