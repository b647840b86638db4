"""Tests of how a teacher is put together for a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import LabelConfig, RegionsConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.store.run import StageFolder
from hts_ray.teacher.actor import (
    Teaching,
    prior_log_likelihoods,
    region_scorer,
    region_sources,
    table_info,
)
from hts_ray.teacher.captioner import DummyCaptioner, PromptScores, plain_images

CLASSES = hico_classes().subset([0, 5, 9, 100])


class CountingCaptioner(DummyCaptioner):
    """Counts the images it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> PromptScores:
        """Count and score."""
        self.images += len(images)
        return super().score(images, prompts)


def rows(folder: Path, good: int, bad: int = 0) -> pa.Table:
    uris = []
    for number in range(good):
        path = folder / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        uris.append(str(path))
    uris += [str(folder / f"missing-{number}.png") for number in range(bad)]
    ids = [Path(uri).stem for uri in uris]
    return pa.table({"image_id": ids, "uri": uris, "split": ["train"] * len(uris)})


def plan(folder: Path, table: pa.Table, regions: Any = None, **teacher: Any) -> Teaching:
    config = LabelConfig.model_validate(
        {"teacher": {"model": "builtin:dummy", **teacher}, "regions": regions or {}}
    )
    return Teaching.plan(config, CLASSES, table, StageFolder(str(folder), "region_scores", "k"))


def test_prior_of_plain_images(tmp_path: Path) -> None:
    """Catches a prior that averages log-probabilities instead of probabilities."""
    teaching = plan(tmp_path, rows(tmp_path, 1), null_images=4, max_batch_regions=3)
    prior = prior_log_likelihoods(DummyCaptioner(), teaching)
    scores = DummyCaptioner().score(plain_images(4), CLASSES.primary_prompts).log_likelihoods
    np.testing.assert_allclose(prior, np.log(np.exp(scores.astype(np.float64)).mean(0)), rtol=1e-6)


def test_prior_of_a_sample_is_kept_for_the_run(tmp_path: Path) -> None:
    """Catches a second pass that pays for the prior again, and a prior of other settings."""
    table = rows(tmp_path, 12, bad=3)
    captioner = CountingCaptioner()
    teaching = plan(tmp_path, table, prior="sample", prior_sample=8)
    first = prior_log_likelihoods(captioner, teaching)
    assert first is not None
    scored = captioner.images
    assert 5 <= scored <= 8  # the unreadable ones of the sample are left out
    other_regions = {"grid_scales": [], "grid_steps": []}
    again = plan(tmp_path, table, other_regions, prior="sample", prior_sample=8)
    np.testing.assert_array_equal(prior_log_likelihoods(captioner, again), first)
    assert captioner.images == scored
    for changed in ({"prior_sample": 7}, {"append_eos": True}, {"template_reduction": "max"}):
        settings = {"prior": "sample", "prior_sample": 8, **changed}
        prior_log_likelihoods(captioner, plan(tmp_path, table, **settings))
        assert captioner.images > scored
        scored = captioner.images
    assert prior_log_likelihoods(captioner, plan(tmp_path, table, prior="none")) is None
    unreadable = plan(tmp_path, rows(tmp_path, 0, bad=2), prior="sample")
    with pytest.raises(DataError, match="prior=plain"):
        prior_log_likelihoods(captioner, unreadable)


def test_table_info_tells_what_the_scores_are(tmp_path: Path) -> None:
    """Catches caption probabilities that the filter would take for log-likelihoods."""
    table = rows(tmp_path, 1)
    info = table_info(DummyCaptioner(), plan(tmp_path, table, prompt_templates=2))
    assert info["score_kind"] == "log_likelihood"
    assert [len(counts) for counts in info["token_counts"]] == [2] * 4
    assert len(info["prior_log_likelihoods"]) == 4
    json.dumps(info)
    said = table_info(DummyCaptioner(), plan(tmp_path, table, mode="captions"))
    assert said["score_kind"] == "log_probability"
    assert said["prior_log_likelihoods"] is None


def test_scorer_gets_what_the_settings_ask_for(tmp_path: Path) -> None:
    """Catches a search without its offsets or its gate, and captions matched to wrong columns."""
    table = rows(tmp_path, 6)
    teaching = plan(tmp_path, table, {"budget": 20}, search="top_k", search_alpha=0.5)
    scorer = region_scorer(DummyCaptioner(), teaching, "cpu")
    assert scorer.limit == 3
    prior = prior_log_likelihoods(DummyCaptioner(), teaching)
    assert prior is not None
    assert scorer.offsets_C is not None
    np.testing.assert_allclose(scorer.offsets_C, -0.5 * prior)
    gated = region_scorer(DummyCaptioner(), plan(tmp_path, table, search="objects"), "cpu")
    assert gated.gate is not None
    objects = [of_class.object for of_class in CLASSES]
    assert [gated.gate.prompts[i].split()[-1] for i in gated.gate.object_of_class] == [
        (name or "").replace("_", " ").split()[-1] for name in objects
    ]
    speaking = region_scorer(DummyCaptioner(), plan(tmp_path, table, mode="captions"), "cpu")
    assert speaking.matcher is not None
    caption = CLASSES.primary_prompts[2]
    matched = speaking.matcher([caption])[0]
    assert max(matched, key=lambda position: matched[position]) == 2


def test_boxes_that_fit_no_image_are_refused_before_the_run(tmp_path: Path) -> None:
    """Catches a run that is paid for and has used none of the boxes it was given."""
    table = rows(tmp_path, 2)
    boxes = {
        "images": [{"id": 1, "file_name": "elsewhere.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes))
    with pytest.raises(DataError, match="none is in the manifest"):
        plan(tmp_path, table, {"boxes": str(path)})
    before = region_sources(RegionsConfig(boxes=str(path)))
    boxes["images"][0]["file_name"] = "0.png"
    path.write_text(json.dumps(boxes))
    assert plan(tmp_path, table, {"boxes": str(path)}).given is not None
    assert region_sources(RegionsConfig(boxes=str(path))) != before
    with pytest.raises(ConfigError, match=r"label.regions.boxes = '/no/such.json'"):
        region_sources(RegionsConfig(boxes="/no/such.json"))
