"""Tests of an OpenAI-compatible endpoint as the teacher's engine, against a server that misbehaves.

The server answers with what transformers itself makes of a tiny checkpoint, and what the package is
to say of the same images comes from its own scoring of that checkpoint.
"""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from servers import Chat, ChatFault, chat_server

from hts_ray.classes import hico_classes
from hts_ray.config import CaptionConfig, LabelConfig, RegionsConfig, TeacherConfig
from hts_ray.errors import ConfigError, DataError
from hts_ray.images.decode import DecodedImage
from hts_ray.teacher.actor import region_scorer
from hts_ray.teacher.assignment import Assignment
from hts_ray.teacher.captioner import AskedCaptioner
from hts_ray.teacher.models.chat import ChatTeacher, cost_of, log_odds
from hts_ray.teacher.models.endpoint import Endpoint, check_endpoint
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.scorers import ImageFailure, ImageTask, ScoredImage

PHRASES = ["a dog", "a person riding a horse", "a horse"]
SHORT = CaptionConfig(max_tokens=8)
RNG = np.random.default_rng(0)
IMAGES = [
    *(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((48, 64), (64, 40))),
    np.zeros((64, 64, 3), dtype=np.uint8),
]


@pytest.fixture(scope="module")
def checkpoint(tiny_path: Callable[[str], Path]) -> Path:
    return tiny_path("answering")


@cache
def loaded(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(path)


def as_transformers(path: Path) -> Any:
    """Return what answers as a server of the checkpoint would, by `generate` of transformers."""
    model, processor = loaded(path)

    def answer(words: str, image: Image.Image, request: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": words}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        assert request["temperature"] == 0
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=request["max_tokens"], do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        ids = out.sequences[0, inputs["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        if request.get("logprobs"):
            best = out.logits[0][0].log_softmax(-1).topk(request["top_logprobs"])
            top = [
                {"token": processor.tokenizer.decode([token]), "logprob": value, "bytes": None}
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return [choice]

    return answer


def plain(words: str, image: Image.Image, request: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer without a model, by the image's red."""
    red = float(np.asarray(image)[..., 0].mean())
    message = {"role": "assistant", "content": f"a picture of red {red:.0f}"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    if request.get("logprobs"):
        top = [{"token": t, "logprob": v, "bytes": None} for t, v in (("Yes", -0.1), (" No", -2.5))]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return [choice] * request.get("n", 1)


@pytest.fixture
def server() -> Iterator[Chat]:
    with chat_server(Chat(plain)) as chat:
        yield chat


def settings(chat: Chat, mode: str = "captions", **more: Any) -> TeacherConfig:
    requests = {"timeout": 1.0, "retries": 1, **more.pop("requests", {})}
    return TeacherConfig.model_validate(
        {"model": "tiny", "engine": "openai", "endpoint": chat.url, "mode": mode,
         "image_format": "png", "requests": requests, **more}
    )  # fmt: skip


def test_answers_are_those_of_our_own_scoring(checkpoint: Path) -> None:
    """Catches another prompt, another token's odds, or an image that is not what was cropped."""
    own = load_captioner(TeacherConfig(model=str(checkpoint), mode="questions"))
    assert isinstance(own, AskedCaptioner)
    with chat_server(Chat(as_transformers(checkpoint))) as chat:
        served = load_captioner(settings(chat, "questions"))
        assert isinstance(served, AskedCaptioner)
        expected = own.ask(IMAGES, PHRASES).log_odds
        assert np.ptp(expected) > 0.3
        assert served.ask(IMAGES, PHRASES).log_odds == pytest.approx(expected, abs=1e-3)
        texts = [[caption.text for caption in of_image] for of_image in own.caption(IMAGES, SHORT)]
        found = served.caption(IMAGES, SHORT)
        assert [[caption.text for caption in of_image] for of_image in found] == texts
        assert texts[0] != texts[2]


def red(value: int) -> np.ndarray:
    return np.full((32, 32, 3), (value, 0, 0), dtype=np.uint8)


def scored(chat: Chat, reds: list[int], **more: Any) -> list[ScoredImage | ImageFailure]:
    """Score red images as an actor does, each with its one region."""
    config = LabelConfig(
        teacher=settings(chat, **more), regions=RegionsConfig(grid_scales=(), grid_steps=())
    )
    assignment = Assignment(config, hico_classes().subset([0, 5]))
    scorer = region_scorer(load_captioner(config.teacher), assignment, "cpu")
    return scorer([ImageTask(DecodedImage(red(r), 32, 32), str(r)) for r in reds])


def is_red(value: int) -> Any:
    return lambda words, image: abs(np.asarray(image)[..., 0].mean() - value) < 0.5


def test_what_may_pass_is_tried_again(server: Chat) -> None:
    """Catches an image lost to a rate limit or a restart, and a server's wish that is not kept."""
    wait = {"Retry-After": "0.7"}
    server.faults = [
        ChatFault(is_red(10), status=429, headers=wait, times=1),
        ChatFault(is_red(20), status=500, times=1),
        ChatFault(is_red(30), seconds=1.5, times=1),
    ]
    started = time.monotonic()
    results = scored(server, [10, 20, 30, 40])
    assert all(isinstance(one, ScoredImage) for one in results), results
    assert [one.captions[0][0] for one in results] == [
        f"a picture of red {n}0" for n in range(1, 5)
    ]
    assert time.monotonic() - started > 0.7
    assert len(server.requests) == 7


BROKEN = {
    "bad JSON": b'{"choices": [',
    "HTML": b"<html>busy</html>",
    "no choices": b'{"id": "1", "object": "chat.completion", "choices": []}',
    "null": b'{"id": "1", "choices": null}',
    "empty text": b'{"choices": [{"index": 0, "finish_reason": "content_filter",'
    b' "message": {"role": "assistant", "content": ""}}]}',
}


def test_an_image_that_keeps_failing_is_quarantined_alone(server: Chat) -> None:
    """Catches a bad answer taken for a label, one that ends the run, and a neighbour lost by it."""
    reasons = ["HTTP 500", "HTTP 429", "HTTP 400", "no answer"] + ["read"] * 4 + ["empty answer"]
    statuses = [ChatFault(is_red(10 * n), status=s) for n, s in enumerate((500, 429, 400), 1)]
    silent = ChatFault(is_red(40), seconds=1.6)
    bodies = [ChatFault(is_red(50 + 10 * n), body=b) for n, b in enumerate(BROKEN.values())]
    server.faults = [*statuses, silent, *bodies]
    results = scored(server, [*range(10, 100, 10), 200])
    assert isinstance(results[-1], ScoredImage)
    for result, reason in zip(results[:-1], reasons, strict=True):
        assert isinstance(result, ImageFailure)
        assert reason in result.message, result.message
        assert result.kind == "teacher_error"


@pytest.mark.parametrize("status", [500, 401])
def test_a_server_that_fails_altogether_ends_the_run(server: Chat, status: int) -> None:
    """Catches a run that quarantines a million images over a server that has gone."""
    server.faults = [ChatFault(status=status)]
    with pytest.raises(ConfigError, match="no longer answers" if status == 500 else "key"):
        scored(server, [10, 20, 30])


def test_requests_in_flight_are_bounded_and_paid_once(server: Chat) -> None:
    """Catches a server that is flooded, one that idles, and tokens that nobody counts."""
    server.faults = [ChatFault(seconds=0.05)]
    config = settings(server, requests={"max_concurrency": 3, "price_in": 2.0, "price_out": 10.0})
    teacher = load_captioner(config)
    assert isinstance(teacher, ChatTeacher)
    teacher.caption([red(n) for n in range(9)], SHORT)
    assert server.running[1] == 3
    assert teacher.usage == {"requests": 9, "tokens_read": 900, "tokens_written": 27}
    assert cost_of(teacher.usage, config.requests) == {
        "cost": pytest.approx(900 * 2e-6 + 27 * 1e-5)
    }
    assert cost_of(teacher.usage, settings(server).requests) == {}


def test_samples_and_further_fields_are_asked_for(server: Chat) -> None:
    """Catches samples that are all the same one, and options that do not arrive."""
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    teacher = load_captioner(settings(server, engine_options=options, instruction="Look."))
    sampled = CaptionConfig(decoding="sample", count=3, temperature=0.5)
    assert len(teacher.caption([red(1)], sampled)[0]) == 3
    (request,) = server.requests
    assert [request[name] for name in ("n", "temperature", "top_p")] == [3, 0.5, 0.9]
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert request["messages"][0]["content"][1]["text"] == "Look."


def test_the_key_comes_from_the_environment_alone(
    server: Chat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a key in an error or a log, and a run that starts with a wrong one."""
    server.key = "sk-secret"
    config = settings(server, requests={"key_variable": "HTS_TEST_KEY"})
    caplog.set_level(logging.DEBUG)
    for value, said in ((None, "not given in HTS_TEST_KEY"), ("sk-other", "in HTS_TEST_KEY")):
        if value is not None:
            monkeypatch.setenv("HTS_TEST_KEY", value)
        with pytest.raises(ConfigError, match=said) as error:
            check_endpoint(config)
        assert "sk-" not in str(error.value)
    monkeypatch.setenv("HTS_TEST_KEY", "sk-secret")
    check_endpoint(config)
    assert "sk-secret" not in caplog.text


def test_an_endpoint_is_tried_before_a_run(server: Chat) -> None:
    """Catches mistakes that cost a cluster before they show."""
    check_endpoint(settings(server))
    check_endpoint(settings(server, "questions"))
    with pytest.raises(ConfigError, match=r"label\.teacher\.model = 'other'.*it offers tiny"):
        check_endpoint(settings(server, model="other"))
    with pytest.raises(ConfigError, match=r"label\.teacher\.endpoint.*no answer"):
        check_endpoint(settings(Chat(plain, url="http://127.0.0.1:9/v1")))
    server.answer = lambda words, image, request: plain(words, image, {})
    with pytest.raises(ConfigError, match="log-probabilities"):
        check_endpoint(settings(server, "questions"))
    top = {"token": "Maybe", "logprob": -0.1, "bytes": None, "top_logprobs": []}
    server.answer = lambda words, image, request: [
        {**plain(words, image, {})[0], "logprobs": {"content": [{**top, "top_logprobs": [top]}]}}
    ]
    with pytest.raises(ConfigError, match="begins with 'Maybe', neither with yes nor with no"):
        check_endpoint(settings(server, "questions"))


def test_log_odds_count_every_spelling() -> None:
    """Catches odds of one spelling alone, and an answer that is not listed taken for impossible."""
    first = [("Yes", -1.0), (" yes", -2.0), ("No", -3.0), ("Yesterday", -0.5), ("the", -6.0)]
    assert log_odds(first) == pytest.approx(np.logaddexp(-1.0, -2.0) + 3.0)
    assert log_odds([("Yes", -0.1), ("the", -6.0)]) == pytest.approx(-0.1 + 6.0)
    with pytest.raises(DataError):
        log_odds([("the", -0.1)])


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_pictures_are_sent_as_they_are(kind: str) -> None:
    """Catches crops (views that are not contiguous) sent with other pixels."""
    image = np.asarray(Image.linear_gradient("L").convert("RGB"))[10:60, 20:100]
    config = TeacherConfig(
        model="m", engine="openai", endpoint="http://h/v1", mode="captions", image_format=kind
    )
    url = Endpoint(config).picture(image)
    head, _, data = url.partition(",")
    assert head == f"data:image/{kind};base64"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
    assert found.shape == image.shape
    assert np.abs(found - image).max() <= (0 if kind == "png" else 6)


WRONG = [
    ({"engine": "vllm", "model": "a/b"}, "190 times"),
    ({"engine": "openai", "model": "a", "endpoint": "http://h/v1"}, "190 times"),
    ({"engine": "openai", "model": "a", "mode": "captions"}, "needs endpoint"),
    ({"endpoint": "http://h/v1"}, "needs engine=openai"),
    ({"engine": "openai", "model": "a", "mode": "captions", "endpoint": "h:8000"}, "must begin"),
    (
        {"engine": "openai", "model": "a", "mode": "captions", "endpoint": "http://k@h/v1"},
        "no user",
    ),
    ({"engine": "openai", "mode": "captions", "endpoint": "http://h/v1"}, "endpoint's name"),
    ({"engine": "vllm", "mode": "captions"}, "a hub id"),
    (
        {"engine": "vllm", "model": "a/b", "mode": "captions", "caption": {"decoding": "beam"}},
        "beam",
    ),
    ({"engine_options": {"a": 1}}, "needs engine"),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], said: str) -> None:
    """Catches a run that starts Ray only to fail."""
    with pytest.raises(ValueError, match=said):
        TeacherConfig.model_validate(values)
