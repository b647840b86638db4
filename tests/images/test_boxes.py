"""Tests of the files of given boxes.

The layouts are those of public files: the first rows of pocket's instances_train2015.json and
of PPDM's trainval_hico.json, whose boxes of one image differ by one pixel as here.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hts_ray.errors import ConfigError, DataError
from hts_ray.images.boxes import GivenBoxes, GivenImage, read_given_boxes
from hts_ray.images.regions import Detection

HICODET = {
    "annotation": [
        {
            "boxes_h": [[208.0, 33.0, 427.0, 300.0], [213.0, 20.0, 438.0, 357.0]],
            "boxes_o": [[59.0, 98.0, 572.0, 405.0], [77.0, 115.0, 583.0, 396.0]],
            "hoi": [152, 153],
            "object": [3, 3],
            "verb": [72, 76],
        },
        {"boxes_h": [], "boxes_o": [], "hoi": [], "object": [], "verb": []},
    ],
    "filenames": ["HICO_train2015_00000001.jpg", "HICO_train2015_00000014.jpg"],
    "empty": [1],
    "objects": ["person", "bicycle", "car", "motorcycle", "hot_dog"],
    "verbs": ["adjust"],
    "correspondence": [[0, 4, 4]],
    "size": [[640, 480], [550, 412]],
}
TRAINVAL_HICO = [
    {
        "file_name": "HICO_train2015_00000001.jpg",
        "img_id": 1,
        "annotations": [
            {"bbox": [207, 32, 426, 299], "category_id": 1},
            {"bbox": [58, 97, 571, 404], "category_id": 4},
        ],
        "hoi_annotation": [
            {"subject_id": 0, "object_id": 1, "category_id": 73, "hoi_category_id": 153}
        ],
    },
    {"file_name": "HICO_train2015_00000014.jpg", "annotations": [], "hoi_annotation": []},
]
COCO = {
    "images": [
        {"id": 9, "file_name": "000000000009.jpg", "width": 640, "height": 480},
        {"id": 25, "file_name": "zebras/000000000025.jpg", "width": 640, "height": 426},
    ],
    "annotations": [
        {"image_id": 25, "bbox": [385.53, 60.03, 214.97, 297.16], "category_id": 25, "iscrowd": 0},
        {"image_id": 9, "bbox": [10.5, 20, 30, 40], "category_id": 1},
        {"image_id": 9, "bbox": [0, 0, 640, 480], "category_id": 1, "iscrowd": 1},
        {"image_id": 777, "bbox": [0, 0, 5, 5], "category_id": 1},
    ],
    "categories": [{"id": 1, "name": "person"}, {"id": 25, "name": "Zebra"}],
}


def write(folder: Path, value: Any, name: str = "boxes.json") -> str:
    path = folder / name
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def parquet(folder: Path, columns: dict[str, Any], name: str = "boxes.parquet") -> str:
    pq.write_table(pa.table(columns), folder / name)
    return str(folder / name)


def of_file(boxes: GivenBoxes, name: str, width: int = 640, height: int = 480) -> GivenImage:
    return boxes.of(name.rpartition(".")[0], f"/data/{name}", width, height)


def test_hicodet_layout(tmp_path: Path) -> None:
    """Catches pixels counted from 1, and objects named by another file's order."""
    boxes = read_given_boxes(write(tmp_path, HICODET))
    assert len(boxes) == 2
    found = of_file(boxes, "HICO_train2015_00000001.jpg")
    assert found.detections == [
        Detection((207, 32, 427, 300), "person", 1.0, True),
        Detection((212, 19, 438, 357), "person", 1.0, True),
        Detection((58, 97, 572, 405), "motorcycle", 1.0),
        Detection((76, 114, 583, 396), "motorcycle", 1.0),
    ]
    assert (found.boxes, found.problems) == ([], [])
    assert of_file(boxes, "HICO_train2015_00000014.jpg", 550, 412) == GivenImage([], [], [])
    assert of_file(boxes, "HICO_train2015_00000002.jpg") == GivenImage([], [], [])


def test_trainval_hico_layout(tmp_path: Path) -> None:
    """Catches category ids read as positions, and COCO's gaps in them forgotten."""
    boxes = read_given_boxes(write(tmp_path, TRAINVAL_HICO))
    assert of_file(boxes, "HICO_train2015_00000001.jpg").detections == [
        Detection((207, 32, 426, 299), "person", 1.0, True),
        Detection((58, 97, 571, 404), "motorcycle", 1.0),
    ]
    ids = {14: "parking meter", 15: "bench", 58: "hot dog", 90: "toothbrush", "13": "stop sign"}
    for key, name in ids.items():
        annotations = [
            {"bbox": [1, 2, 30, 40], "category_id": 1},
            {"bbox": [1, 2, 30, 40], "category_id": key},
        ]
        value = [{"file_name": "a.jpg", "annotations": annotations, "hoi_annotation": []}]
        one = read_given_boxes(write(tmp_path, value, "one.json"))
        assert of_file(one, "a.jpg").detections[1].label == name


def test_coco_layout(tmp_path: Path) -> None:
    """Catches x, y, width, height read as corners, and crowds taken for a person."""
    boxes = read_given_boxes(write(tmp_path, COCO))
    assert of_file(boxes, "000000000009.jpg").detections == [
        Detection((10.5, 20, 40.5, 60), "person", 1.0, True)
    ]
    zebra = of_file(boxes, "000000000025.jpg", 640, 426).detections[0]
    assert zebra.box == pytest.approx((385.53, 60.03, 600.5, 357.19))
    assert (zebra.label, zebra.is_person) == ("zebra", False)


@pytest.mark.parametrize(
    "categories", [[], [{"id": 1, "name": "shelf"}, {"id": 25, "name": "cart"}]]
)
def test_boxes_without_persons_are_regions(tmp_path: Path, categories: list[Any]) -> None:
    """Catches boxes of one's own classes that are neither pair nor person, and so never seen."""
    boxes = read_given_boxes(write(tmp_path, {**COCO, "categories": categories}))
    found = of_file(boxes, "000000000009.jpg")
    assert found == GivenImage([], [(10.5, 20, 40.5, 60)], [])


def test_person_labels_are_the_settings(tmp_path: Path) -> None:
    """Catches persons told by a fixed name instead of label.regions.person_labels."""
    boxes = read_given_boxes(write(tmp_path, COCO), person_labels=("ZEBRA",))
    assert [one.is_person for one in of_file(boxes, "000000000009.jpg").detections] == [False]
    zebras = boxes.of("zebras/000000000025.jpg", "x", 640, 426)
    assert [one.is_person for one in zebras.detections] == [True]


BOX_TYPES = {
    "list": pa.list_(pa.list_(pa.float64())),
    "fixed": pa.list_(pa.list_(pa.float32(), 4)),
    "large": pa.large_list(pa.list_(pa.float32())),
    "ints": pa.list_(pa.list_(pa.int32())),
}


@pytest.mark.parametrize("kind", BOX_TYPES)
def test_parquet(tmp_path: Path, kind: str) -> None:
    """Catches Arrow types that mean the same and are refused, and rows shifted by empty ones."""
    columns = {
        "image_id": pa.array(["a", "b", "c"]),
        "boxes": pa.array(
            [[[1, 2, 30, 40], [5, 5, 9, 9]], None, [[0, 0, 10, 10]]], BOX_TYPES[kind]
        ),
        "labels": pa.array([["Person", "hot_dog"], None, [None]]),
        "scores": pa.array([[0.5, 0.25], [], [None]]),
    }
    boxes = read_given_boxes(parquet(tmp_path, columns))
    assert boxes.of("a", "x", 100, 100).detections == [
        Detection((1, 2, 30, 40), "person", 0.5, True),
        Detection((5, 5, 9, 9), "hot dog", 0.25),
    ]
    assert boxes.of("b", "x", 100, 100) == GivenImage([], [], [])
    assert boxes.of("c", "x", 100, 100) == GivenImage([], [(0, 0, 10, 10)], [])


@pytest.mark.parametrize("key", ["file_name", "uri", "image_id"])
def test_parquet_is_found_by_each_key(tmp_path: Path, key: str) -> None:
    """Catches a key column that is documented and not read."""
    value = {"image_id": "cats/1.jpg", "file_name": "1.jpg", "uri": "s3://bucket/cats/1.jpg"}[key]
    path = parquet(tmp_path, {key: pa.array([value]), "boxes": pa.array([[[1.0, 2.0, 3.0, 4.0]]])})
    found = read_given_boxes(path).of("cats/1.jpg", "s3://bucket/cats/1.jpg", 9, 9)
    assert found.boxes == [(1, 2, 3, 4)]


def one_box(name: str, x: float = 0) -> dict[str, Any]:
    return {"file_name": name, "annotations": [{"bbox": [x, 0, x + 10, 10], "category_id": 1}]}


def test_lookup_prefers_what_tells_more(tmp_path: Path) -> None:
    """Catches boxes of a namesake in another folder."""
    names = ("cats/1.jpg", "dogs/1.jpg", "2.jpg", "deep/cats/1.jpg")
    value = [one_box(name, n) for n, name in enumerate(names)]
    boxes = read_given_boxes(write(tmp_path, value))

    def left(image_id: str, uri: str) -> float | None:
        found = boxes.of(image_id, uri, 100, 100).detections
        return found[0].box[0] if found else None

    assert left("cats/1.jpg", "/photos/cats/1.jpg") == 0
    assert left("dogs/1", "/photos/x") == 1
    assert left("2", "/photos/2.jpg") == 2
    assert left("other", "/photos/2.jpg") == 2
    assert left("other", "s3://bucket/2.jpg") == 2
    assert left("1.jpg", "file:///photos/dogs/1.jpg") == 1
    assert left("1.jpg", "/photos/deep/cats/1.jpg") == 3
    assert left("3", "/photos/3.jpg") is None
    with pytest.raises(DataError, match=r"'cats/1.jpg' and 'deep/cats/1.jpg'"):
        left("1.jpg", "/photos/birds/1.jpg")


def test_lookup_undoes_escapes_of_uris(tmp_path: Path) -> None:
    """Catches names with spaces, which are escaped in URIs of buckets."""
    boxes = read_given_boxes(write(tmp_path, [one_box("a cat.jpg")]))
    assert boxes.of("x", "s3://bucket/a%20cat.jpg", 20, 20).detections
    assert not boxes.of("x", "/photos/a%20cat.jpg", 20, 20).detections


def test_counting_refuses_boxes_shared_by_two_images(tmp_path: Path) -> None:
    """Catches the boxes of train/1.jpg given to test/1.jpg too, by the file name alone."""
    boxes = read_given_boxes(write(tmp_path, [one_box("1.jpg"), one_box("2.jpg")]))
    assert boxes.count_found(["a/1", "a/2", "a/3"], ["a/1.jpg", "a/2.jpg", "a/3.jpg"]) == 2
    with pytest.raises(DataError, match="both images 'a/1' and 'b/1'"):
        boxes.count_found(["a/1", "b/1"], ["a/1.jpg", "b/1.jpg"])


def test_bad_boxes_are_told_and_left_out(tmp_path: Path) -> None:
    """Catches one bad box that stops a run or reaches the crops."""
    bad = [
        [float("nan"), 0, 5, 5],
        [0, 0, float("inf"), 5],
        [5, 5, 5, 9],
        [9, 9, 1, 1],
        [700, 10, 800, 20],
        [1, 2, 3],
        ["a", "b", "c", "d"],
        None,
        [0, 0, 10**400, 5],
        [True, 0, 5, 5],
    ]
    good = [[-5, -5, 20, 20], [630, 470, 900, 900]]
    annotations = [{"bbox": box, "category_id": 1} for box in (*bad, *good)]
    boxes = read_given_boxes(write(tmp_path, [{"file_name": "a.jpg", "annotations": annotations}]))
    found = of_file(boxes, "a.jpg")
    assert [one.box for one in found.detections] == [(0, 0, 20, 20), (630, 470, 640, 480)]
    assert len(found.problems) == len(bad)
    assert found.problems[0].startswith("box 0 (person) [nan, 0, 5, 5]: not four finite")
    assert found.problems[2].endswith("no area")
    assert found.problems[4].endswith("outside the image of 640x480 pixels")


def test_scores_outside_their_range_are_told(tmp_path: Path) -> None:
    """Catches scores in per cent, which would put a file's pairs before all others."""
    columns = {
        "image_id": pa.array(["a"]),
        "boxes": pa.array([[[1.0, 2.0, 3.0, 4.0]] * 3]),
        "scores": pa.array([[0.5, 97.0, float("nan")]]),
    }
    found = read_given_boxes(parquet(tmp_path, columns)).of("a", "x", 9, 9)
    assert len(found.boxes) == 1
    assert [problem.rpartition(": ")[2] for problem in found.problems] == [
        "the score 97 is not in [0, 1]",
        "the score nan is not in [0, 1]",
    ]


def test_boxes_follow_a_resized_copy(tmp_path: Path) -> None:
    """Catches boxes of the original on a copy of half its size, or on one that was turned."""
    boxes = read_given_boxes(write(tmp_path, COCO))
    half = of_file(boxes, "000000000009.jpg", 320, 240)
    assert half.detections[0].box == pytest.approx((5.25, 10, 20.25, 30))
    turned = of_file(boxes, "000000000009.jpg", 480, 640)
    assert (turned.detections, turned.boxes) == ([], [])
    assert "drawn on 640x480 pixels" in turned.problems[0]


GARBLED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"left,top\n1,2\n", "neither Parquet nor readable JSON"),
    "cut": (json.dumps(COCO).encode()[:-20], "neither Parquet nor readable JSON"),
    "utf-16": (json.dumps(COCO).encode("utf-16")[:-1], "neither Parquet nor readable JSON"),
    "deep": (b"[" * 100_000, "neither Parquet nor readable JSON"),
    "pickle": (pickle.dumps(COCO), "a Python pickle"),
    "matlab": (b"MATLAB 5.0 MAT-file, anno_bbox", "a MATLAB file"),
    "parquet": (b"PAR1" + b"x" * 50, "damaged Parquet"),
    "number": (b"5", "found number"),
    "no images": (b'{"images": [], "annotations": []}', "no image"),
    "keys": (b'{"boxes": []}', "an object with 'boxes'"),
    "empty list": (b"[]", "a list that begins with null"),
    "list of lists": (b"[[1]]", "a list that begins with list"),
    "results": (b'[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', "COCO results"),
    "image without name": (
        b'{"images": [{"id": 1}], "annotations": []}',
        "images[0].file_name: Field required",
    ),
    "images no list": (
        b'{"images": {}, "annotations": []}',
        "images: Input should be a valid list",
    ),
    "annotation no object": (
        b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [3]}',
        "annotations[0]: Input should be a valid dictionary",
    ),
    "id twice": (
        b'{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}],'
        b' "annotations": []}',
        "two images with the id 1",
    ),
    "category": (
        b'[{"file_name": "a", "annotations": [{"bbox": [1, 2, 3, 4], "category_id": 12}]}]',
        "category 12, which is none of COCO's",
    ),
    "second entry": (
        b'[{"file_name": "a", "annotations": []}, {"file_name": "b"}]',
        "[1].annotations: Field required",
    ),
    "surrogate": (
        b'[{"file_name": "\\ud800", "annotations": []}]',
        "[0].file_name: Input should be a valid string",
    ),
    "lengths": (b'{"filenames": ["a"], "annotation": []}', "1 filenames, 0 annotation"),
    "pairs": (
        b'{"filenames": ["a"], "annotation": [{"boxes_h": [[1, 2, 3, 4]], "boxes_o": []}]}',
        "1 boxes_h, 0 boxes_o",
    ),
    "object": (
        b'{"filenames": ["a"], "objects": ["person"], "annotation":'
        b' [{"boxes_h": [[1, 2, 3, 4]], "boxes_o": [[1, 2, 3, 4]], "object": [7]}]}',
        "object 7",
    ),
}


@pytest.mark.parametrize("name", GARBLED)
def test_other_files_are_refused_with_what_they_are(tmp_path: Path, name: str) -> None:
    """Catches a traceback, or a file that is taken for one without boxes."""
    data, message = GARBLED[name]
    path = tmp_path / "boxes.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_given_boxes(str(path))
    text = str(caught.value)
    assert str(path) in text
    assert message in text
    assert "accepted are COCO json" in text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_id": ["a"]}, "the columns image_id"),
        ({"boxes": [[[1.0, 2.0, 3.0, 4.0]]]}, "the columns boxes"),
        ({"image_id": [1], "boxes": [[[1.0, 2.0, 3.0, 4.0]]]}, "image_id of type int64"),
        ({"image_id": [None, "a"], "boxes": [[], []]}, "no image_id in row 0"),
        ({"image_id": ["a"], "boxes": [[1.0, 2.0, 3.0, 4.0]]}, "boxes of type list<"),
        ({"image_id": ["a"], "boxes": [[["x"]]]}, "boxes of type list<"),
        (
            {"image_id": ["a"], "boxes": [[[1.0, 2.0, 3.0, 4.0]]], "labels": [["a", "b"]]},
            "2 labels for 1 boxes in row 0",
        ),
        (
            {"image_id": ["a"], "boxes": [[[1.0, 2.0, 3.0, 4.0]]], "scores": [[{"a": 1}]]},
            "scores of type",
        ),
        (
            {"image_id": ["a", None], "boxes": [[[1.0, 2.0, 3.0, 4.0]]] * 2},
            "no image_id in row 1",
        ),
    ],
)
def test_other_parquet_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    """Catches columns of other types that end in Arrow's traceback."""
    with pytest.raises(DataError) as caught:
        read_given_boxes(parquet(tmp_path, columns))
    assert message in str(caught.value)
    assert "accepted are" in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """Catches the storage's traceback for a path that leads nowhere."""
    with pytest.raises(ConfigError, match=r"label\.regions\.boxes = .*cannot be read.*[Nn]o such"):
        read_given_boxes(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError):
        read_given_boxes(str(tmp_path))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(
            st.sampled_from(
                [
                    *("images", "annotations", "categories", "file_name", "id", "image_id"),
                    *("bbox", "category_id", "name", "width", "filenames", "annotation", "size"),
                    *("boxes_h", "boxes_o", "object", "objects", "score", "iscrowd"),
                ]
            ),
            inner,
            max_size=6,
        ),
    ),
    max_leaves=30,
)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """Return a file with one value, at any depth, replaced by another."""
    value = json.loads(json.dumps(draw(st.sampled_from([COCO, HICODET, TRAINVAL_HICO]))))
    place, key = value, draw(st.sampled_from(list(value) if isinstance(value, dict) else [0, 1]))
    while isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
        place = place[key]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
    place[key] = draw(json_values)
    return value


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(json_values, damaged()))
def test_any_json_is_read_or_refused(tmp_path: Path, value: Any) -> None:
    """Catches a traceback for any damage to a file."""
    path = write(tmp_path, value)
    try:
        boxes = read_given_boxes(path)
    except DataError:
        return
    for image_id in ("HICO_train2015_00000001", "000000000009"):
        try:
            found = boxes.of(image_id, f"/x/{image_id}.jpg", 640, 480)
        except DataError:
            continue
        for box in [*(one.box for one in found.detections), *found.boxes]:
            assert 0 <= box[0] < box[2] <= 640
            assert 0 <= box[1] < box[3] <= 480
    assert len(pickle.loads(pickle.dumps(boxes))) == len(boxes)


def test_boxes_are_cheap_to_send(tmp_path: Path) -> None:
    """Catches millions of Python objects, or look-up tables, in what every worker is sent."""
    images, per_image = 2000, 10
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 300, (images, per_image, 2))
    values = np.concatenate([corners, corners + 50], axis=2)
    columns = {
        "image_id": [f"HICO_train2015_{n:08d}" for n in range(images)],
        "boxes": values.tolist(),
        "labels": [["person", "horse"] * (per_image // 2)] * images,
    }
    boxes = read_given_boxes(parquet(tmp_path, columns))
    boxes.of("HICO_train2015_00000007", "x", 640, 480)
    sent = pickle.dumps(boxes)
    assert len(sent) < 40 * images * per_image + 60 * images
    received = pickle.loads(sent)
    for number in (0, 7, images - 1):
        name = f"HICO_train2015_{number:08d}"
        found = received.of(name, "x", 640, 480)
        assert found == boxes.of(name, "x", 640, 480)
        np.testing.assert_allclose([one.box for one in found.detections], values[number])


def test_geometry_needs_no_torch() -> None:
    """Catches a driver that waits for torch before it can refuse a wrong setting."""
    code = (
        "import sys, hts_ray.images.regions, hts_ray.images.boxes,"
        " hts_ray.teacher.detector;"
        " print(sorted({'torch', 'ray', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
