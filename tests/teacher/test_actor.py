"""Tests of how a teacher is put together for a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assignments import CLASSES, plan, rows
from PIL import Image
from servers import Chat, ChatFault, chat_server

from hts_ray.engine.deaths import AttemptLog
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.telemetry import Meter
from hts_ray.store.run import StageFolder
from hts_ray.teacher.actor import TeacherActor, region_scorer, table_info
from hts_ray.teacher.captioner import DummyCaptioner
from hts_ray.teacher.models.files import NamedModel
from hts_ray.teacher.prior import plain_images, prior_scores
from hts_ray.teacher.scorers import CaptionVotes, PromptLikelihoods, QuestionOdds
from hts_ray.teacher.stage import usage_of


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
    asked = table_info(DummyCaptioner(), plan(tmp_path, table, mode="questions", question="{}!"))
    assert (asked["score_kind"], asked["question"]) == ("log_odds", "{}!")
    assert asked["answers"]["no"][:2] == ["no", " no"]
    assert asked["prior_log_likelihoods"] is None
    plain = DummyCaptioner().ask(plain_images(3), CLASSES.primary_prompts).log_odds
    np.testing.assert_allclose(asked["prior_log_odds"], np.median(plain, axis=0), rtol=1e-6)
    json.dumps([said, asked])


def test_scorer_gets_what_the_settings_ask_for(tmp_path: Path) -> None:
    """Catches a search without its offsets, and captions matched to wrong columns."""
    table = rows(tmp_path, 6)
    assignment = plan(tmp_path, table, {"budget": 20}, search="top_k", search_alpha=0.5)
    scorer = region_scorer(DummyCaptioner(), assignment, "cpu")
    assert scorer.limit == 3
    assert scorer.caption is None
    prior = prior_scores(DummyCaptioner(), assignment)
    assert prior is not None
    assert isinstance(scorer.class_scores, PromptLikelihoods)
    assert scorer.class_scores.search is not None
    assert scorer.class_scores.search.offsets_C is not None
    np.testing.assert_allclose(scorer.class_scores.search.offsets_C, -0.5 * prior)
    speaking = region_scorer(DummyCaptioner(), plan(tmp_path, table, mode="captions"), "cpu")
    assert speaking.caption is not None
    assert isinstance(speaking.class_scores, CaptionVotes)
    caption = CLASSES.primary_prompts[2]
    asking = region_scorer(DummyCaptioner(), plan(tmp_path, table, mode="questions"), "cpu")
    assert isinstance(asking.class_scores, QuestionOdds)
    assert asking.caption is None
    matched = speaking.class_scores.matcher([caption])[0]
    assert CLASSES.positions[max(matched, key=lambda class_id: matched[class_id])] == 2


def test_an_actor_hashes_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches every actor reading all files of a model again to know its name."""
    settings = {"model": "builtin:world_captioner", "search": "top_k", "search_alpha": 0.5}
    assignment = plan(tmp_path, rows(tmp_path, 1), **settings)
    monkeypatch.setattr(NamedModel, "fingerprint", lambda named: pytest.fail("hashed"))
    info = table_info(DummyCaptioner(), assignment)
    region_scorer(DummyCaptioner(), assignment, "cpu")
    assert info["model_fingerprint"] == assignment.fingerprint == "model@1"


def test_a_failed_request_costs_its_image_and_every_token_counts(tmp_path: Path) -> None:
    """Catches rows lost or mixed up by failing requests, and tokens that no stats show."""
    table = rows(tmp_path, 5)

    def answer(words: str, image: Image.Image, request: Any) -> list[dict[str, Any]]:
        message = {"role": "assistant", "content": "a person riding a bicycle"}
        return [{"index": 0, "finish_reason": "stop", "message": message}]

    def is_third(words: str, image: Image.Image) -> bool:
        return np.array_equal(image, Image.open(table["uri"][2].as_py()))

    with chat_server(Chat(answer, faults=[ChatFault(is_third, status=500)])) as chat:
        asked = {
            "engine": "openai", "endpoint": chat.url, "model": "tiny", "mode": "captions",
            "image_format": "png", "requests": {"retries": 0, "price_in": 5.0},
        }  # fmt: skip
        assignment = plan(tmp_path, table, {"grid_scales": [], "grid_steps": []}, **asked)
        actor = TeacherActor(assignment, AttemptLog(), Meter("label", "run"))
        found = actor(decode_batch(table, assignment.config.images)).to_pylist()
    assert [row["image_id"] for row in found] == table["image_id"].to_pylist()
    assert [row["status"] for row in found] == ["ok", "ok", "quarantined", "ok", "ok"]
    assert "HTTP 500" in found[2]["error"]
    assert found[0]["captions"] == [["a person riding a bicycle"]]
    (counts,) = Path(assignment.usage_path).glob("*.json")
    assert json.loads(counts.read_text()) == {
        "requests": 4, "tokens_read": 400, "tokens_written": 12
    }  # fmt: skip
    stage = StageFolder(str(tmp_path), "region_scores", "k")
    assert usage_of(stage, assignment.config.teacher)["cost"] == pytest.approx(400 * 5e-6)
