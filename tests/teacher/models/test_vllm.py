"""Tests of vLLM as the teacher's engine: with a stand-in of its API, and with the real one.

The stand-in generates with transformers; `make test-vllm` runs the others in an environment that
has vLLM for CPUs. What is expected is the package's own scoring of the same checkpoint.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from assignments import plan, rows
from PIL import Image

from hts_ray.classes import hico_classes
from hts_ray.config import CaptionConfig, LabelConfig, TeacherConfig
from hts_ray.engine.deaths import AttemptLog
from hts_ray.engine.decoding import decode_batch
from hts_ray.engine.telemetry import Meter
from hts_ray.errors import ConfigError
from hts_ray.images.manifest import open_manifest
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import MANIFEST_SCHEMA, read_table, write_table
from hts_ray.teacher.actor import TeacherActor
from hts_ray.teacher.captioner import AskedCaptioner
from hts_ray.teacher.models import catalog
from hts_ray.teacher.models.loading import load_captioner
from hts_ray.teacher.stage import label_images

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read when vLLM is imported
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
PHRASES = ["a dog", "a person riding a horse", "a horse"]
SHORT = CaptionConfig(max_tokens=8)
RNG = np.random.default_rng(0)
IMAGES = [
    *(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((48, 64), (64, 40))),
    np.zeros((64, 64, 3), dtype=np.uint8),
]
SMALL_ENGINE = {"enforce_eager": True, "max_model_len": 512}


@pytest.fixture(scope="module")
def checkpoint(tiny_path: Callable[[str], Path]) -> Path:
    return tiny_path("answering")


def config(path: Path, **more: Any) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {"model": str(path), "engine": "vllm", "mode": "questions", "engine_options": SMALL_ENGINE,
         "dtype": "float32", **more}
    )  # fmt: skip


def check_answers(path: Path) -> None:
    """Compare vLLM's answers with ours: greedy texts equal, odds within 1e-3."""
    own = load_captioner(TeacherConfig(model=str(path), mode="questions"))
    served = load_captioner(config(path))
    assert isinstance(own, AskedCaptioner)
    assert isinstance(served, AskedCaptioner)
    expected = own.ask(IMAGES, PHRASES)
    assert np.ptp(expected.log_odds) > 0.3
    found = served.ask(IMAGES, PHRASES)
    assert found.log_odds == pytest.approx(expected.log_odds, abs=1e-3)
    texts = [[caption.text for caption in of_image] for of_image in own.caption(IMAGES, SHORT)]
    captions = served.caption(IMAGES, SHORT)
    assert [[caption.text for caption in of_image] for of_image in captions] == texts
    assert texts[0] != texts[2]


class StandIn:
    """`AsyncLLMEngine` of vLLM as far as it is used, for one checkpoint of transformers."""

    def __init__(self, arguments: Any) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(
            arguments.model, dtype=torch.float32
        ).eval()
        self.processor = AutoProcessor.from_pretrained(arguments.model)

    @classmethod
    def from_engine_args(cls, arguments: Any) -> StandIn:
        """Return the engine."""
        assert arguments.enable_prefix_caching
        assert arguments.limit_mm_per_prompt == {"image": 1}
        return cls(arguments)

    async def generate(
        self, prompt: Any, parameters: Any, number: str, *, tokenization_kwargs: Any
    ) -> AsyncIterator[Any]:
        """Yield the finished answer."""
        inputs = self.processor(
            images=prompt["multi_modal_data"]["image"], text=prompt["prompt"],
            return_tensors="pt", **tokenization_kwargs,
        )  # fmt: skip
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=parameters.max_tokens, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        start = inputs["input_ids"].shape[1]
        ids = out.sequences[0, start:].tolist()
        logs = out.logits[0][0].log_softmax(-1).tolist()
        asked = getattr(parameters, "logprob_token_ids", None)
        one = types.SimpleNamespace(
            text=self.processor.tokenizer.decode(ids, skip_special_tokens=True),
            token_ids=ids,
            logprobs=[{t: types.SimpleNamespace(logprob=logs[t]) for t in asked}]
            if asked
            else None,
        )
        yield types.SimpleNamespace(outputs=[one], prompt_token_ids=list(range(start)))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("vllm")
    module.AsyncEngineArgs = module.SamplingParams = types.SimpleNamespace
    module.AsyncLLMEngine = StandIn
    module.sampling_params = types.SimpleNamespace(
        RequestOutputKind=types.SimpleNamespace(FINAL_ONLY=2)
    )
    module.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_the_same_is_asked_and_read(stand_in: None, checkpoint: Path) -> None:
    """Catches another text of the chat template, other answer tokens, and regions mixed up."""
    check_answers(checkpoint)


def test_what_it_cannot_run_is_refused(
    stand_in: None, tiny_blip_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches vLLM started on a captioner without a chat, or not installed at all."""
    with pytest.raises(ConfigError, match="no chat model"):
        catalog.check_teacher(config(tiny_blip_path, mode="captions"))
    catalog.check_teacher(config(checkpoint))
    mine = catalog.model_fingerprint(config(checkpoint))
    assert mine != catalog.model_fingerprint(TeacherConfig(model=str(checkpoint)))
    monkeypatch.setattr(catalog, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hts-ray\[vllm\]'"):
        catalog.check_teacher(config(checkpoint))


def test_a_dead_engine_ends_its_process(
    stand_in: None, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches every image of a run quarantined by an engine that has died, or its actor kept."""

    class EngineDeadError(Exception):
        pass

    async def died(*_: object, **__: object) -> AsyncIterator[Any]:
        raise EngineDeadError
        yield

    def ended(code: int) -> None:
        raise SystemExit(code)

    table = rows(tmp_path, 3)
    asked = config(checkpoint, mode="captions").model_dump(exclude={"requests"})
    assignment = plan(tmp_path, table, {"grid_scales": [], "grid_steps": []}, **asked)
    actor = TeacherActor(assignment, AttemptLog(), Meter("label", "run"))
    monkeypatch.setattr(StandIn, "generate", died)
    monkeypatch.setattr("hts_ray.teacher.actor.os._exit", ended)
    with pytest.raises(SystemExit, match="1"):
        actor(decode_batch(table, assignment.config.images))


@pytest.mark.vllm
@pytest.mark.timeout(1500)
def test_the_real_engine_answers_as_we_do(checkpoint: Path) -> None:
    """Catches a version of vLLM that reads another prompt, image or position than transformers."""
    check_answers(checkpoint)


def kill_engine_once(stage: StageFolder, killed: list[int]) -> None:
    """Wait for the first rows, and kill the process in which the model runs."""
    while not any(Path(stage.path).rglob("*.parquet")):
        time.sleep(0.05)
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [process.info["name"]])
        if "EngineCore" in title:
            process.kill()
            killed.append(process.pid)


@pytest.mark.vllm
@pytest.mark.timeout(1500)
def test_a_killed_engine_is_started_again(
    checkpoint: Path, tmp_path: Path, ray_session: None
) -> None:
    """Catches an actor that goes on with a dead engine, and images lost or doubled by it."""
    listed = []
    for number in range(24):
        uri = str(tmp_path / f"{number}.png")
        Image.fromarray(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(uri)
        listed.append({"image_id": str(number), "uri": uri, "split": "train"})
    manifest = str(tmp_path / "manifest.parquet")
    write_table(manifest, pa.Table.from_pylist(listed, schema=MANIFEST_SCHEMA))
    stage = StageFolder(str(tmp_path / "run"), "region_scores", "k")
    killed: list[int] = []
    threading.Thread(target=kill_engine_once, args=(stage, killed), daemon=True).start()
    stats = label_images(
        LabelConfig(teacher=config(checkpoint, prior="none"), batch_images=2, block_rows=2),
        manifest=open_manifest(manifest),
        class_table=hico_classes().subset([0, 5, 9, 100]),
        stage=stage,
    )
    assert killed
    assert (stats["rows_out"], stats["quarantined"]) == (24, 0)
    ids = read_table(stage.path, ["image_id"])["image_id"].to_pylist()
    assert sorted(ids) == sorted(row["image_id"] for row in listed)
