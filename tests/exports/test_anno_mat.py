"""anno.mat, as the package's own reader of HICO's file takes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.io
from labeled_run import POSITIVES

from hts_ray.classes import hico_classes
from hts_ray.errors import ConfigError, DataError
from hts_ray.exports.anno_mat import anno_variables
from hts_ray.exports.records import Context, LabeledImage, Origin
from hts_ray.exports.source import read_labels
from hts_ray.exports.writing import export_labels
from hts_ray.images.hico import read_anno_table

CONTEXT = Context(hico_classes(), Origin("pseudo_labels"))


def test_it_reads_back_through_hico_s_reader(tmp_path):
    """Catches labels that end in other rows, columns or splits than HICO's reader expects."""
    images = [
        LabeledImage("a", "/x/a.jpg", "train", (18, 599), ignored_ids=(20,)),
        LabeledImage("b", "/x/b.jpg", "test", (0,), negative_ids=(5, 7)),
    ]
    path = tmp_path / "anno.mat"
    scipy.io.savemat(path, anno_variables(images, CONTEXT))
    a, b = read_anno_table(str(path)).to_pylist()
    assert (a["image_id"], a["split"], a["positive_ids"]) == ("a", "train", [18, 599])
    assert a["ambiguous_ids"] == [20]
    assert len(a["negative_ids"]) == 597
    assert (b["image_id"], b["split"], b["positive_ids"]) == ("b", "test", [0])
    assert (b["negative_ids"], b["ambiguous_ids"]) == ([5, 7], [])


def test_classes_that_a_run_leaves_out_are_unknown(labeled, tmp_path):
    """Catches 597 negatives that nobody looked for."""
    kept = [i for i in read_labels(labeled).images() if i.image_id in ("a/1", "a/2", "b/3")]
    variables = anno_variables(kept, Context(labeled.class_table, Origin("pseudo_labels")))
    anno = variables["anno_train"]
    assert anno.shape == (600, 3)
    assert np.isnan(anno).sum() == 3 * 597
    assert anno[[18, 19, 74]].T.tolist() == [[1, -1, -1], [1, 1, -1], [-1, -1, -1]]
    assert "anno_test" not in variables


def test_the_command_writes_matlab_version_5(labeled, tmp_path):
    """Catches a version or a shape that MATLAB or the paper's code does not open."""
    fewer = replace(labeled, class_table=labeled.class_table)
    rows = read_labels(fewer)
    names = [row["image_id"] not in ("b/1", "b/2") for row in rows.table.to_pylist()]
    rows = replace(rows, table=rows.table.filter(names))  # or two have one name
    path = tmp_path / "anno.mat"
    done = export_labels(fewer, rows, "anno-mat", str(path))
    assert path.read_bytes().startswith(b"MATLAB 5.0")
    table = {row["image_id"]: row for row in read_anno_table(str(path)).to_pylist()}
    assert table["1"]["positive_ids"] == POSITIVES["a/1"]
    assert done.tally.bad_images == {"missing": 1}


def test_two_images_of_one_name_are_refused(labeled, tmp_path):
    """Catches labels of one image that silently belong to another afterwards."""
    with pytest.raises(DataError, match=r"2 file names occur more than once .'1'"):
        export_labels(labeled, read_labels(labeled), "anno-mat", str(tmp_path / "a.mat"))
    assert not list(tmp_path.iterdir())


def test_other_classes_and_splits_are_refused(own_classes):
    """Catches a file in which row 18 means something else than it does in HICO."""
    context = Context(own_classes.class_table, Origin("pseudo_labels"))
    with pytest.raises(ConfigError, match="'a red thing'"):
        anno_variables([], context)
    image = LabeledImage("a", "/a.jpg", "validation", (18,))
    with pytest.raises(ConfigError, match="'validation'"):
        anno_variables([image], CONTEXT)
