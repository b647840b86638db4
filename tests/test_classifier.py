"""Students for users: files, folders and pixels in, labels out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hts_ray
from hts_ray.classes import hico_classes
from hts_ray.classifier import Classifier, find_images, grid
from hts_ray.config import StudentConfig
from hts_ray.errors import ConfigError, DataError

TABLE = hico_classes().subset([74, 18, 19])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save the packaged CLIP as a zero-shot student of three classes."""
    from hts_ray.student.checkpoints import save_student
    from hts_ray.student.model import build_student

    path = tmp_path_factory.mktemp("student") / "clip"
    save_student(build_student(StudentConfig(), TABLE), str(path))
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return hts_ray.load(folder, device="cpu")


@pytest.fixture
def photo(tmp_path):
    """A file of noise, turned by EXIF, in a folder with other files."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right
    path = tmp_path / "photos" / "deep" / "a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path, exif=exif)
    (path.parent / "notes.txt").write_text("x")
    (tmp_path / "photos" / "broken.jpg").write_text("no image")
    return path


def test_three_lines_are_enough(folder, photo):
    """Catches a promise of the documentation that no longer holds."""
    model = hts_ray.load(folder)
    (found,) = model.predict([str(photo)], top_k=2)
    assert found.labels[0].name in TABLE.names
    assert len(found.labels) == 2


def test_scores_are_those_of_the_student(model, photo):
    """Catches another preprocessing than the one the student was trained with."""
    import torch

    turned = np.rot90(np.asarray(Image.open(photo)), -1)
    with torch.no_grad():
        expected = model.student(model.student.preprocess([turned]))[0]
    (found,) = model.predict(photo, top_k=None)
    assert (found.width, found.height, found.source) == (60, 90, str(photo))
    by_id = {label.class_id: label.score for label in found.labels}
    assert [by_id[int(i)] for i in TABLE.ids] == pytest.approx(expected.tolist(), abs=1e-3)
    scores = [label.score for label in found.labels]
    assert scores == sorted(scores, reverse=True)


def test_every_kind_of_input_is_the_same_image(model, photo):
    """Catches pixels that are turned, swapped or rescaled on one of the ways in."""
    upright = np.ascontiguousarray(np.rot90(np.asarray(Image.open(photo)), -1))
    inputs = [photo, photo.read_bytes(), Image.open(photo), upright, f"file://{photo}"]
    found = model.predict(inputs, top_k=None, batch_size=2)
    assert [p.source for p in found[1:4]] == ["image 1", "image 2", "image 3"]
    for prediction in found[1:]:
        assert [label.score for label in prediction.labels] == pytest.approx(
            [label.score for label in found[0].labels], abs=1e-4
        )
    gray = io.BytesIO()
    Image.new("L", (30, 30)).save(gray, "GIF")
    assert model.predict(gray.getvalue())[0].width == 30


def test_top_k_and_threshold_cut(model, photo):
    """Catches a threshold on ranks, or one that is applied before the sorting."""
    (everything,) = model.predict(photo, top_k=None)
    middle = everything.labels[1].score
    (found,) = model.predict(photo, top_k=None, threshold=middle)
    assert found.labels == everything.labels[:2]
    assert model.predict(photo, top_k=1, threshold=middle)[0].labels == everything.labels[:1]
    assert model.predict(photo, threshold=1e9)[0].labels == ()
    with pytest.raises(ConfigError, match="top_k = 0"):
        model.predict(photo, top_k=0)


def test_regions_are_where_a_label_scores_most(model, photo):
    """Catches a box of another crop, or one in pixels of a scaled copy."""
    image = np.zeros((90, 60, 3), np.uint8)
    (found,) = model.predict(photo, regions=True)
    boxes = [region.box for region in grid(60, 90)]
    upright = np.rot90(np.asarray(Image.open(photo)), -1)
    for label in found.labels:
        assert label.box in boxes
        left, top, right, bottom = (int(side) for side in label.box)
        assert max(right - left, bottom - top) <= max(image.shape)
        row = TABLE.index_of(label.class_id)
        score = model.logits([np.ascontiguousarray(upright[top:bottom, left:right])])[0, row]
        assert label.box_score == pytest.approx(float(score), abs=1e-3)
        assert label.box_score >= label.score - 1e-3  # the whole image is among the crops
    assert found.to_dict()["labels"][0]["box"] == list(found.labels[0].box)


def test_a_bad_image_is_named_or_kept(model, photo, tmp_path):
    """Catches one lost file that costs a batch, and one that passes in silence."""
    paths = [str(photo), str(tmp_path / "none.jpg"), str(photo)]
    with pytest.raises(DataError, match=r"none\.jpg cannot be used"):
        model.predict(paths)
    first, lost, last = model.predict(paths, on_error="keep")
    assert first.labels == last.labels
    assert lost.labels == ()
    assert "none.jpg" in lost.error
    assert lost.to_dict() == {"image": paths[1], "error": lost.error}
    with pytest.raises(ConfigError, match="uint8"):
        model.predict(np.zeros((5, 5)))
    with pytest.raises(ConfigError, match="paths, URIs"):
        model.predict([3])


def test_folders_and_uris_are_listed(photo, tmp_path):
    """Catches files that are no images in a list of images, and mistyped paths."""
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / "photos", photo, tmp_path / "phtos", tmp_path / "empty"]
    found, bad = find_images([*map(str, paths), f"file://{photo}"])
    assert found == [str(photo), str(photo), f"file://{photo}"]
    assert [(Path(p.source).name, p.error.split(":")[0]) for p in bad][1:] == [
        ("phtos", "nothing is there"),
        ("empty", "holds no image"),
    ]
    assert Path(bad[0].source).name == "broken.jpg"
    with pytest.raises(DataError, match="storage of 'nope://host/x'"):
        find_images(["nope://host/x"])


def test_addresses_of_the_web_are_read(model, photo):
    """Catches http addresses that are listed and then not read, or read as folders."""
    from functools import partial
    from http.server import HTTPServer, SimpleHTTPRequestHandler
    from threading import Thread

    handler = partial(SimpleHTTPRequestHandler, directory=str(photo.parent))
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        found, bad = find_images([address, f"{address}.none"])
        predictions = model.predict(found)
        server.shutdown()
    assert [p.source for p in bad] == [f"{address}.none"]
    assert predictions[0].labels == model.predict(photo)[0].labels


def test_a_missing_student_or_device_is_told(folder, tmp_path):
    """Catches a traceback of torch for a mistake of a user."""
    with pytest.raises(DataError, match="no student at"):
        hts_ray.load(str(tmp_path))
    with pytest.raises(ConfigError, match="device = 'cuda:99'"):
        hts_ray.load(folder, device="cuda:99")
    assert isinstance(hts_ray.load(folder, device="cpu"), Classifier)
