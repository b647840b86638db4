"""HICO's anno.mat: read as it is, and refused with a reason in every other state."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.hico import read_anno_table, read_hico
from hts_ray.images.prepared import inspect_images
from hts_ray.store.tables import MANIFEST_SCHEMA, QUARANTINE_SCHEMA

SIZES = {"train": 3, "test": 2}


def names(split: str, count: int | None = None) -> list[str]:
    return [f"HICO_{split}2015_{i + 1:08d}.jpg" for i in range(count or SIZES[split])]


def actions() -> np.ndarray:
    rows = [(c.object, c.verb, f"{c.verb}ing") for c in hico_classes()]
    kinds = [("nname", object), ("vname", object), ("vname_ing", object)]
    return np.array(rows, dtype=kinds).reshape(600, 1)


def cells(values: list[str]) -> np.ndarray:
    out = np.empty((len(values), 1), dtype=object)
    out[:, 0] = values
    return out


def variables() -> dict[str, np.ndarray]:
    content = {"list_action": actions()}
    for split, count in SIZES.items():
        anno = np.full((600, count), np.nan)
        anno[18, 0], anno[19, 0], anno[20, 0] = 1, -1, 0
        anno[599, 0] = 1
        anno[0, 1] = -1
        content[f"list_{split}"] = cells(names(split))
        content[f"anno_{split}"] = anno
    return content


def mat(content: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    scipy.io.savemat(stream, content, do_compression=True)
    return stream.getvalue()


def build(root: Path, content: dict[str, np.ndarray] | bytes | None = None) -> Path:
    data = content if isinstance(content, bytes) else mat(content or variables())
    (root / "anno.mat").write_bytes(data)
    for i, (split, count) in enumerate(SIZES.items()):
        folder = root / "images" / f"{split}2015"
        folder.mkdir(parents=True)
        for j, name in enumerate(names(split, count)):
            Image.new("RGB", (40 + j, 30), (i * 90, j * 80, 0)).save(folder / name)
    return root


def test_annotations_and_sizes(tmp_path):
    """Transposed labels, ids off by one (MATLAB counts from 1), NaN taken for 0."""
    prepared = inspect_images(read_hico(str(build(tmp_path))))
    table = prepared.manifest
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert prepared.quarantine.schema.equals(QUARANTINE_SCHEMA)
    rows = table.to_pylist()
    assert [r["image_id"] for r in rows] == [n[:-4] for s in SIZES for n in names(s)]
    assert rows[0] == {
        "image_id": "HICO_train2015_00000001",
        "uri": str(tmp_path / "images/train2015/HICO_train2015_00000001.jpg"),
        "width": 40,
        "height": 30,
        "split": "train",
        "positive_ids": [18, 599],
        "negative_ids": [19],
        "ambiguous_ids": [20],
    }
    assert (rows[1]["positive_ids"], rows[1]["negative_ids"]) == ([], [0])
    assert rows[2]["positive_ids"] == []  # annotated with nothing known, not unannotated
    assert [r["split"] for r in rows] == ["train"] * 3 + ["test"] * 2
    expected = {"images": 5, "usable": 5, "annotated": 5, "quarantined": 0, "duplicates": 0}
    assert prepared.counts.items() >= expected.items()
    only = inspect_images(read_hico(str(tmp_path), splits=["test"]))
    assert only.manifest["split"].to_pylist() == ["test"] * 2


def test_annotations_alone(tmp_path):
    """`hts evaluate --annotations anno.mat` has no images to look at."""
    path = tmp_path / "anno.mat"
    path.write_bytes(mat(variables()))
    table = read_anno_table(str(path))
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert table["positive_ids"].to_pylist()[3] == [18, 599]
    assert table["width"].null_count == 5
    content = {k: v for k, v in variables().items() if k in ("list_test", "anno_test")}
    path.write_bytes(mat(content))
    assert len(read_anno_table(str(path))) == 2
    path.write_bytes(mat({"x": np.zeros(3)}))
    with pytest.raises(DataError, match="neither anno_train nor anno_test"):
        read_anno_table(str(path))


@pytest.mark.parametrize("turned", [False, True])
def test_other_writers_of_the_same_content(tmp_path, turned):
    """Lists of dicts are written by scipy as cells of structs and rows for columns."""
    content = variables()
    content["list_action"] = np.array(
        [{"nname": c.object, "vname": c.verb} for c in hico_classes()], dtype=object
    )
    content["list_train"] = np.array(names("train")) if turned else cells(names("train")).T
    assert len(inspect_images(read_hico(str(build(tmp_path, content)))).manifest) == 5


def test_bad_images_are_quarantined(tmp_path):
    """One absent or damaged image must cost one row, with its reason."""
    build(tmp_path)
    folder = tmp_path / "images/train2015"
    first, second, third = names("train")
    (folder / first).unlink()
    (folder / second).write_bytes(b"not a picture")
    (folder / third).write_bytes(b"")
    (folder / "extra.jpg").write_bytes(b"x")
    prepared = inspect_images(read_hico(str(tmp_path)))
    rows = prepared.quarantine.to_pylist()
    assert [(r["image_id"], r["error_kind"]) for r in rows] == [
        (first[:-4], "missing"),
        (second[:-4], "not_an_image"),
        (third[:-4], "empty"),
    ]
    assert {r["stage"] for r in rows} == {"prepare"}
    assert all(r["error"] and r["uri"].endswith(".jpg") for r in rows)
    expected = {"images": 5, "usable": 2, "quarantined": 3, "missing": 1, "unlisted": 1}
    assert prepared.counts.items() >= expected.items()


def test_duplicates_are_counted_and_kept(tmp_path):
    """A dropped duplicate would leave the annotations of its image unread."""
    build(tmp_path)
    folder = tmp_path / "images/train2015"
    data = (folder / names("train")[0]).read_bytes()
    (tmp_path / "images/test2015" / names("test")[0]).write_bytes(data)
    (folder / names("train")[1]).write_bytes(data)
    prepared = inspect_images(read_hico(str(tmp_path)))
    assert prepared.counts["duplicates"] == 2
    assert len(prepared.manifest) == 5


def change(name, function):
    def apply(content):
        content[name] = function(content[name])

    return apply


def put(row, value):
    def apply(anno):
        anno[row, 0] = value
        return anno

    return apply


def swap(action):
    action[[3, 4]] = action[[4, 3]]
    return action


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda c: c.pop("anno_train"), "no variable anno_train"),
        (lambda c: c.pop("list_test"), "no variable list_test"),
        (change("anno_train", lambda a: a[:599]), "599x3.*600x3"),
        (change("anno_train", lambda a: a.T), "transposed"),
        (change("anno_train", lambda a: a[:, :2]), "600x2.*600x3"),
        (change("anno_train", lambda a: np.nan_to_num(a).astype(np.int8)), "is int8.*doubles"),
        (change("anno_train", lambda a: a.astype(complex)), "complex"),
        (change("anno_train", lambda _: cells(["x"] * 600)), "is object"),
        (change("anno_train", put(7, 2.0)), r"anno_train\[7, 0\] = 2"),
        (change("anno_train", put(7, np.inf)), r"\[7, 0\] = inf"),
        (change("anno_train", put(7, 0.5)), "0.5"),
        (change("list_action", lambda a: a[:599]), "599 classes"),
        (change("list_action", swap), r"list_action\[3\] is 'inspect' 'airplane'.*'fly'"),
        (change("list_action", lambda _: np.zeros((600, 1))), r"list_action\[0\] is None"),
        (change("list_train", lambda _: np.zeros((3, 1))), r"list_train\[0\] is float64"),
        (change("list_train", lambda _: cells(["../a.jpg", "b.jpg", "c.jpg"])), "not a file name"),
        (change("list_train", lambda _: cells(["a.jpg", "a.png", "c.jpg"])), "same image id 'a'"),
        (change("list_train", lambda _: cells([*names("test"), "z.jpg"])), "same image id"),
    ],
)
def test_wrong_content_is_refused(tmp_path, break_it, message):
    """A silently shifted class list or an unknown read as ambiguous spoils every number."""
    content = variables()
    break_it(content)
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        read_hico(str(build(tmp_path, content)))
    assert "anno.mat" in str(caught.value)


def test_a_missing_class_list_is_counted(tmp_path):
    """Without list_action nobody can tell whether the rows are in HICO's order."""
    content = variables()
    del content["list_action"]
    prepared = inspect_images(read_hico(str(build(tmp_path, content))))
    assert prepared.counts["class_order_unchecked"] == 1
    assert len(prepared.manifest) == 5


class Bomb:
    """Unpickling it raises; a loader that unpickles would show it."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello", "not a MATLAB v5 file"),
        (b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n", "save -v7"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "save -v7"),
        (pickle.dumps(Bomb()), "pickle.*refused"),
        (pickle.dumps(Bomb(), protocol=0), "not a MATLAB v5 file"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    """A renamed pickle must not run; HDF5 must say what to do."""
    with pytest.raises(DataError, match=message):
        read_hico(str(build(tmp_path, data)))


def test_damaged_files_are_refused(tmp_path):
    """Any cut or flipped byte gives a DataError, never a traceback from scipy or zlib."""
    good = mat(variables())
    build(tmp_path, good)
    rng = np.random.default_rng(0)
    for cut in [100, 130, 137, *rng.integers(140, len(good), 4).tolist()]:
        (tmp_path / "anno.mat").write_bytes(good[:cut])
        with pytest.raises(DataError):
            read_anno_table(str(tmp_path / "anno.mat"))
    for at in rng.integers(0, len(good), 8).tolist():
        damaged = bytearray(good)
        damaged[at] ^= int(rng.integers(1, 256))
        (tmp_path / "anno.mat").write_bytes(damaged)
        try:
            read_anno_table(str(tmp_path / "anno.mat"))
        except DataError:
            continue


def test_layout(tmp_path):
    """The archive has a folder of its own; a split may not have been unpacked."""
    with pytest.raises(DataError, match=r"no anno.mat in .*hts prepare folder"):
        read_hico(str(tmp_path / "nowhere"))
    inner = tmp_path / "hico_20150920"
    inner.mkdir()
    build(inner)
    with pytest.raises(DataError, match="hico_20150920 has one"):
        read_hico(str(tmp_path))
    with pytest.raises(ConfigError, match="'val'"):
        read_hico(str(inner), splits=["val"])
    with pytest.raises(ConfigError, match="splits"):
        read_hico(str(inner), splits=[])
    (inner / "images/test2015").rename(inner / "images/elsewhere")
    with pytest.raises(DataError, match="'test' out of splits"):
        read_hico(str(inner))
    assert len(inspect_images(read_hico(str(inner), splits=["train"])).manifest) == 3
