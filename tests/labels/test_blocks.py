"""The filter over blocks: the dense filter's labels, however many blocks there are."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from dense_filter import dense_labels, dense_thresholds
from hypothesis import given, settings
from hypothesis import strategies as st

from hts_ray.config import FilterConfig
from hts_ray.engine.blocks import Here, OnRay
from hts_ray.errors import DataError
from hts_ray.labels import stage as stage_module
from hts_ray.labels.blocks import plan_blocks
from hts_ray.labels.corrections import read_overrides
from hts_ray.labels.evidence import image_evidence, region_files
from hts_ray.labels.passes import TeacherPass
from hts_ray.labels.select import class_thresholds, find_entries
from hts_ray.labels.stage import choose_labels, filter_regions
from hts_ray.store import storage
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import (
    CORRECTIONS_SCHEMA,
    REGION_SCORES_SCHEMA,
    read_table,
    write_table,
)

IMAGES, CLASSES, FILES = 90, 6, 7
IDS = np.arange(CLASSES, dtype=np.int16) * 3 + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished pass in several files, one of them without an image of the split; corrections."""
    run_dir = tmp_path_factory.mktemp("run")
    stage = StageFolder(str(run_dir), "region_scores", "k")
    random, rows = np.random.default_rng(5), []
    for i in range(IMAGES):
        kinds = ["whole", *random.choice(["grid", "person"], random.integers(0, 4))]
        # Some equal scores, for ties at thresholds and at the cap.
        scores = random.normal(-6, 2, (len(kinds), CLASSES)).round(random.integers(0, 4))
        rows.append(
            {
                "image_id": f"image-{(i * 37) % IMAGES:02d}",
                "uri": f"/{i}.jpg",
                "split": "test" if i % FILES == 3 else "train",
                "boxes": [[0, 0, 9, 9]] * len(kinds),
                "region_kinds": kinds,
                "scores": scores.astype(np.float32).ravel().tolist(),
                "status": "ok",
            }
        )
    rows[5].update(status="quarantined", scores=None, boxes=None, region_kinds=None)
    for part in range(FILES):
        table = pa.Table.from_pylist(rows[part::FILES], schema=REGION_SCORES_SCHEMA)
        write_table(stage.file(f"part-{part}.parquet"), table)
    info = {
        "class_ids": IDS.tolist(),
        "prior_log_likelihoods": random.normal(-6, 1, CLASSES).tolist(),
    }
    storage.write_json(stage.file("table.json"), info)
    stage.publish({"rows_out": IMAGES - 1})
    people = [
        {
            "image_id": name,
            "positive_ids": random.choice(20, 3).tolist(),
            "negative_ids": random.choice(20, 4).tolist(),
            "ambiguous_ids": [4] if i % 3 else None,
        }
        for i, name in enumerate([*(f"image-{n:02d}" for n in range(0, IMAGES, 4)), "elsewhere"])
    ]
    table = pa.Table.from_pylist(people, schema=CORRECTIONS_SCHEMA)
    write_table(str(run_dir / "overrides.parquet"), table)
    return stage


def random_config(draw, overrides):
    low, high = sorted(draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.6, 1.0])) for _ in range(2))
    return FilterConfig(
        negative_threshold=low,
        positive_threshold=high,
        per_class_quantile=draw(st.sampled_from([None, 0.02, 0.7, 0.9, 0.98])),
        quantile_floor=draw(st.sampled_from([0.0, 0.05, 0.2, 0.9])),
        aggregation=draw(st.sampled_from(["max", "mean", "top_k_mean", "noisy_or"])),
        prior=draw(st.sampled_from(["teacher", "sample"])),
        region_kinds=draw(st.sampled_from([None, ("grid",)])),
        min_support=draw(st.integers(1, 2)),
        support_threshold=draw(st.sampled_from([0.0, 0.05, 0.3])),
        max_positives_per_image=draw(st.integers(1, 4)),
        overrides=draw(st.sampled_from([None, overrides])),
    )


def label_lists(labels):
    """Return the positive ids of every image, by falling probability."""
    order_NC = np.argsort(-labels.evidence.probabilities_NC, axis=1, kind="stable")
    rows = zip(order_NC, labels.selection.targets_NC, strict=True)
    return [[int(IDS[c]) for c in order_C if target_C[c] == 1] for order_C, target_C in rows]


def filtered(folder, config, run_dir, blocks=None):
    stage = StageFolder(str(run_dir), "pseudo_labels", "k")
    storage.remove_tree(stage.path)
    filter_regions(config, [TeacherPass(folder, config)], "train", stage, blocks)
    return stage


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_labels_equal_the_dense_filter_s(data, folder, tmp_path_factory):
    """Catches a threshold off by one bit, an entry that mattered and was left out, a lost tie."""
    run_dir = tmp_path_factory.getbasetemp() / "property"
    overrides = f"{folder.run_dir}/overrides.parquet"
    config = random_config(data.draw, overrides)
    corrections = None if config.overrides is None else read_overrides(overrides)
    wanted = dense_labels(folder.path, config, "train", corrections)
    evidence = image_evidence(folder.path, config, "train")
    at_once = choose_labels(evidence, config, IDS, corrections)
    assert label_lists(at_once) == wanted["positive_ids"].to_pylist()
    sizes = {
        "block_bytes": data.draw(st.sampled_from([1, 9000, 1 << 30])),
        "part_images": data.draw(st.sampled_from([1, 30, 1 << 17])),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "plan_blocks", partial(plan_blocks, **sizes))
        if not any(wanted["positive_ids"].to_pylist()):
            with pytest.raises(DataError, match="no pseudo-label is left"):
                filtered(folder, config, run_dir)
            assert not storage.exists(f"{run_dir}/pseudo_labels-k")
            return
        stage = filtered(folder, config, run_dir)
    got = read_table(stage.path)
    if sizes["part_images"] > IMAGES:
        assert got.equals(wanted)  # one file: by id throughout
    assert got.sort_by("image_id").equals(wanted)
    assert stage.stats["positives"] == sum(map(len, wanted["positive_ids"].to_pylist()))
    assert stage.stats["rows_out"] == len(wanted)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_thresholds_are_the_quantiles_to_the_last_bit(data):
    """Catches a search by bit pattern that stops early, in either precision."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    p_NC = random.random((data.draw(st.integers(1, 200)), 5)) ** data.draw(st.integers(1, 6))
    p_NC = p_NC.astype(data.draw(st.sampled_from([np.float32, np.float64])))
    p_NC[random.random(p_NC.shape) < 0.1] = -0.0
    config = FilterConfig(
        positive_threshold=data.draw(st.floats(0.3, 1)),
        negative_threshold=data.draw(st.sampled_from([0.0, 1e-7, 0.1])),
        quantile_floor=data.draw(st.floats(0, 1)),
        per_class_quantile=data.draw(st.floats(0.01, 0.999)),
    )
    wanted = dense_thresholds(p_NC, config)
    assert wanted.dtype == p_NC.dtype
    found = find_entries(p_NC, np.zeros(p_NC.shape, int), config)
    np.testing.assert_array_equal(class_thresholds(found, 5, config), wanted)


def test_a_part_does_not_depend_on_the_blocks(folder):
    """Catches files of labels that change with the size of the blocks, or a file read twice."""
    whole = plan_blocks(region_files(folder.path), IMAGES, part_images=30)
    cut = plan_blocks(region_files(folder.path), IMAGES, part_images=30, block_bytes=1)
    assert len(whole) == 3
    assert all(len(part) == 1 for part in whole)
    assert all(len(block) == 1 for part in cut for block in part)
    assert [[file for block in part for file in block] for part in cut] == [p[0] for p in whole]
    files = [file for part in whole for file in part[0]]
    assert files == sorted(files)
    assert len(files) == FILES
    assert len(plan_blocks(region_files(folder.path), 0)) == 1
    assert len(plan_blocks(region_files(folder.path), IMAGES, 1 << 19)) == 3  # 32 images a part


@pytest.mark.usefixtures("ray_session")
def test_ray_writes_the_same_bytes(folder, tmp_path, monkeypatch):
    """Catches tasks whose results are taken out of order, or that read other settings."""
    sizes = {"block_bytes": 1, "part_images": 30}
    monkeypatch.setattr(stage_module, "plan_blocks", partial(plan_blocks, **sizes))
    overrides = f"{folder.run_dir}/overrides.parquet"
    config = FilterConfig(prior="sample", per_class_quantile=0.8, overrides=overrides)
    here = filtered(folder, config, tmp_path / "here", Here())
    there = filtered(folder, config, tmp_path / "there", OnRay())
    names = [name for name in storage.list_names(here.path) if name != "stats.json"]
    assert names == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "table.json"]
    for name in names:
        assert storage.read_bytes(here.file(name)) == storage.read_bytes(there.file(name))
