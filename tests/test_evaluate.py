"""Matching predictions to annotations."""

import numpy as np
import pyarrow as pa
import pytest

from hts_ray import evaluate, metrics
from hts_ray.classes import hico_classes
from hts_ray.errors import DataError
from hts_ray.evaluate import (
    evaluate_scores,
    few_shot_masks,
    label_matrix,
    read_annotations,
    read_predictions,
)
from hts_ray.store import storage
from hts_ray.store.tables import MANIFEST_SCHEMA, predictions_schema, write_table

CLASSES = hico_classes().subset([18, 4, 100])


def annotated(image_id, split, positive, negative=(), ambiguous=()):
    return {
        "image_id": image_id,
        "uri": f"/{image_id}",
        "split": split,
        "positive_ids": list(positive),
        "negative_ids": list(negative),
        "ambiguous_ids": list(ambiguous),
    }


@pytest.fixture
def manifest(tmp_path):
    rows = [
        annotated("x", "test", [18], [4]),
        annotated("y", "test", [4, 599], [], [18]),
        annotated("z", "test", [100]),
        annotated("r", "train", [18]),
        annotated("s", "train", [18, 4]),
        {"image_id": "u", "uri": "/u", "split": "test"},
    ]
    path = str(tmp_path / "manifest.parquet")
    write_table(path, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    return path


def test_label_matrix_has_all_four_values(manifest):
    """Would catch ambiguous taken for unknown, or ids of absent classes that wrap around."""
    truth = read_annotations(manifest, CLASSES)
    assert truth.image_ids.to_pylist() == ["x", "y", "z"]
    assert truth.labels().tolist() == [[1, -1, -2], [0, 1, -2], [-2, -2, 1]]
    assert truth.train_positives_C.tolist() == [2, 1, 0]


def test_few_shot_is_counted_on_the_training_split(manifest):
    """Would catch HICO's own few-shot list applied to another training set."""
    truth = read_annotations(manifest, CLASSES)
    masks = few_shot_masks(truth.train_positives_C, CLASSES)
    assert masks[1].tolist() == [False, True, True]
    assert few_shot_masks(None, CLASSES) is CLASSES.few_shot


def test_scores_are_matched_by_id_not_by_order(manifest):
    """Would catch predictions compared with another image's annotations."""
    truth = read_annotations(manifest, CLASSES)
    scores = np.where(truth.labels() == 1, 1.0, 0.0)
    order = [2, 0, 1]
    ids = [truth.image_ids[i].as_py() for i in order]
    result = evaluate_scores(ids, scores[order], truth)
    assert result.mean_ap == 1.0
    assert result.num_images == 3


def test_leaving_an_image_out_cannot_help(manifest):
    """Would catch a score that rises when hard images fail to decode."""
    truth = read_annotations(manifest, CLASSES)
    scores = np.where(truth.labels() == 1, 1.0, 0.0)
    result = evaluate_scores(["x", "y"], scores[:2], truth)
    assert result.num_images == 3
    assert result.mean_ap < 1.0
    with pytest.raises(DataError, match="no predicted image"):
        evaluate_scores(["other"], scores[:1], truth)


def test_predictions_are_brought_into_class_order(tmp_path):
    """Would catch columns of one class read as another's."""
    path = str(tmp_path / "predictions-k")
    rows = [
        {"image_id": "x", "scores": [1.0, 2.0, 3.0], "status": "ok"},
        {"image_id": "bad", "scores": None, "status": "quarantined"},
    ]
    table = pa.Table.from_pylist(rows, schema=predictions_schema(3))
    write_table(storage.join(path, "part.parquet"), table)
    storage.write_json(storage.join(path, "table.json"), {"class_ids": [100, 18, 4]})
    ids, scores = read_predictions(path, CLASSES)
    assert ids == ["x"]
    assert scores.tolist() == [[2.0, 3.0, 1.0]]
    with pytest.raises(DataError, match="class id 5"):
        read_predictions(path, hico_classes().subset([5]))


def test_classes_that_do_not_fit_are_read_again(tmp_path, monkeypatch):
    """Catches numbers that change with the memory there is, and a row that moves to another image.

    The reference holds images x classes, as it was done before.
    """
    random, table = np.random.default_rng(2), hico_classes().subset(range(7))
    images, stored_ids = 200, [6, 0, 2, 1, 5, 4, 3]
    rows = [
        annotated(f"{n:03d}", "test", *(random.choice(7, 2).tolist() for _ in range(3)))
        for n in random.permutation(images)
    ]
    manifest, path = str(tmp_path / "manifest.parquet"), str(tmp_path / "predictions-k")
    write_table(manifest, pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    scores_NC = random.normal(size=(images, 7)).round(1).astype(np.float32)
    found = [
        {"image_id": f"{n:03d}", "scores": None if n % 9 == 4 else s.tolist(), "status": "ok"}
        for n, s in enumerate(scores_NC)
    ] + [{"image_id": "unknown", "scores": [9.0] * 7, "status": "ok"}]
    for part in range(3):
        some = pa.Table.from_pylist(found[part::3], schema=predictions_schema(7))
        write_table(storage.join(path, f"part-{part}.parquet"), some)
    storage.write_json(storage.join(path, "table.json"), {"class_ids": stored_ids})

    truth = read_annotations(manifest, table)
    place_N = [int(name) for name in truth.image_ids.to_pylist()]
    missing_N1 = np.array([[n % 9 == 4] for n in place_N])
    matched_NC = np.where(missing_N1, -99, scores_NC[place_N][:, np.argsort(stored_ids)])
    masks = few_shot_masks(truth.train_positives_C, table)
    wanted = metrics.evaluate(matched_NC, truth.labels(), masks).to_dict()
    monkeypatch.setattr(evaluate, "_ROWS", 16)
    assert evaluate.evaluate_stored(path, truth).to_dict() == wanted
    for classes in (1, 3):
        monkeypatch.setattr(evaluate, "_HELD_BYTES", 5 * images * classes)
        assert evaluate.evaluate_stored(path, truth).to_dict() == wanted
    assert 0 < wanted["mAP"] < 1


def test_no_annotation_is_a_clear_error(tmp_path, manifest):
    """Would catch a mean over nothing printed as a result."""
    with pytest.raises(DataError, match="split 'val'"):
        read_annotations(manifest, CLASSES, "val")


def test_label_matrix_of_unannotated_rows_is_unknown():
    """Would catch null lists that fail or count as negative."""
    rows = [{"image_id": "u", "uri": "/u", "split": "test"}]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    assert label_matrix(table, CLASSES).tolist() == [[-2, -2, -2]]
