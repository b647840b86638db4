"""Tests of finding and fetching a model's files."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import servers

from hts_ray.classes import hico_classes
from hts_ray.config import (
    CaptionConfig,
    RegionsConfig,
    StudentConfig,
    TeacherConfig,
    load_config,
    override,
)
from hts_ray.engine.clip import ClipModel
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError
from hts_ray.images.manifest import Manifest
from hts_ray.store.tables import MANIFEST_SCHEMA
from hts_ray.student.model import source_fingerprint
from hts_ray.teacher.detector import pinned_detector
from hts_ray.teacher.models import files
from hts_ray.teacher.models.catalog import (
    hub_clip,
    model_fingerprint,
    model_folder,
    pinned_teacher,
)
from hts_ray.teacher.models.loading import load_captioner

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A stand-in for `snapshot_download`: fails as told, then answers with a folder."""

    def __init__(self, folder: Path, *failures: Exception, local: Path | None = None) -> None:
        self.folder = folder
        self.failures = list(failures)
        self.local = local
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        """Answer as `snapshot_download` would."""
        self.calls.append({"repo_id": repo_id, **options})
        if options["local_files_only"]:
            if self.local is None:
                from huggingface_hub.errors import LocalEntryNotFoundError

                raise LocalEntryNotFoundError("not in the cache")
            return str(self.local)
        if self.failures:
            raise self.failures.pop(0)
        return str(self.folder)


@pytest.fixture
def hub(tiny_blip_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import huggingface_hub
    from huggingface_hub import constants

    waits: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def install(*failures: Exception, local: Path | None = None) -> tuple[Hub, list[float]]:
        answers = Hub(tiny_blip_path, *failures, local=local)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", answers)
        return answers, waits

    return install


def http_error(status: int, kind: Any = None) -> Exception:
    import huggingface_hub.errors as errors
    from huggingface_hub.errors import HfHubHTTPError

    library = sys.modules[errors.Response.__module__.partition(".")[0]]  # whichever client it uses
    request = library.Request("GET", "https://huggingface.co/some/model")
    response = library.Response(status, request=request)
    return (kind or HfHubHTTPError)(f"status {status}", response=response)


def test_a_hub_model_is_fetched_and_loaded(hub: Any) -> None:
    """Catches a hub id that is not fetched at its revision, or with pickled weights."""
    answers, waits = hub()
    captioner = load_captioner(TeacherConfig(model="some/model", revision="v1"))
    assert len(captioner.caption([np.zeros((9, 9, 3), np.uint8)], CaptionConfig())[0]) == 1
    assert [call["repo_id"] for call in answers.calls] == ["some/model"]
    assert answers.calls[0]["revision"] == "v1"
    patterns = answers.calls[0]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not {"*.bin", "*.py", "*"} & set(patterns)
    assert not waits


def test_a_failing_hub_is_asked_again(hub: Any) -> None:
    """Catches one lost connection of one actor ending a run of hours."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    answers, waits = hub(http_error(503), TimeoutError("slow"), LocalEntryNotFoundError("lost"))
    model_folder(TeacherConfig(model="some/model"))
    assert len(answers.calls) == 4
    assert waits == list(files.RETRY_WAITS)
    answers, _ = hub(*[http_error(429)] * 9)
    with pytest.raises(ConfigError, match="not to be had from the hub"):
        model_folder(TeacherConfig(model="some/model"))
    assert len(answers.calls) == 4


def test_a_wrong_id_is_not_asked_for_again(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mistyped id, or work offline, answered after half a minute of waiting."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    answers, waits = hub(http_error(404, RepositoryNotFoundError))
    with pytest.raises(ConfigError, match=r"no such model.*status 404"):
        model_folder(TeacherConfig(model="some/model"))
    assert (len(answers.calls), waits) == (1, [])
    forbidden = LocalEntryNotFoundError("forbidden")
    forbidden.__cause__ = http_error(403)
    answers, waits = hub(forbidden)
    with pytest.raises(ConfigError, match="status 403"):
        model_folder(TeacherConfig(model="some/model"))
    assert (len(answers.calls), waits) == (1, [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    answers, waits = hub(LocalEntryNotFoundError("offline"))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        model_folder(TeacherConfig(model="some/model"))
    assert (len(answers.calls), waits) == (1, [])


def test_a_commit_in_the_cache_needs_no_network(hub: Any, tiny_blip_path: Path) -> None:
    """Catches every actor asking the hub about a commit that cannot change."""
    answers, _ = hub(http_error(404), local=tiny_blip_path)
    config = TeacherConfig(model="some/model", revision=COMMIT)
    assert model_folder(config) == tiny_blip_path
    assert [call["local_files_only"] for call in answers.calls] == [True]
    # A branch may have moved.
    with pytest.raises(ConfigError, match="status 404"):
        model_folder(TeacherConfig(model="some/model", revision="main"))


def test_half_a_snapshot_is_completed(hub: Any, tiny_blip_path: Path, tmp_path: Path) -> None:
    """Catches a download that was cut off being taken for the model."""
    half = tmp_path / "half"
    shutil.copytree(tiny_blip_path, half)
    (half / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    (half / "model-1.safetensors").touch()
    answers, _ = hub(local=half)
    config = TeacherConfig(model="some/model", revision=COMMIT)
    assert model_folder(config) == tiny_blip_path
    assert [call["local_files_only"] for call in answers.calls] == [True, False]
    (half / "model-2.safetensors").touch()
    assert model_folder(config) == half


# -- which commit a branch means -----------------------------------------------------------------

OTHER = "f" * 40


@pytest.fixture
def served(
    tiny_blip_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[servers.Hub]:
    """Serve a model from a hub with two commits; waits cost nothing, the cache is empty."""
    from huggingface_hub import constants

    with servers.hub_server() as hub:
        hub.commits = {COMMIT: tiny_blip_path, OTHER: tiny_blip_path}
        hub.branches = {"main": COMMIT}
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
        yield hub


NAMED = TeacherConfig(model="some/model")


def test_a_branch_that_moves_is_another_stage(served: servers.Hub, tmp_path: Path) -> None:
    """Catches answers of last month's `main` taken for those of today's."""
    from hts_ray.teacher.stage import plan_label

    config = load_config(extra={"run_dir": str(tmp_path / "run")})
    config = override(config, {"label": {"teacher": {"model": NAMED.model}}})
    run = Run(config, hico_classes().subset(range(3)))
    manifest = Manifest("manifest", MANIFEST_SCHEMA.empty_table())
    first = plan_label(run, manifest)
    assert first.inputs["teacher"] == f"some/model@{COMMIT}"
    assert plan_label(run, manifest).folder.key == first.folder.key
    served.branches["main"] = OTHER
    assert plan_label(run, manifest).folder.key != first.folder.key
    # A commit that is written down asks nobody, and is the same stage.
    served.asked.clear()
    written = run.changed({"label": {"teacher": {"revision": COMMIT}}})
    assert plan_label(written, manifest).folder.key == first.folder.key
    assert served.asked == []


def test_nodes_load_the_commit_of_the_driver(served: servers.Hub) -> None:
    """Catches nodes that each take the `main` of the moment."""
    config = pinned_teacher(NAMED)
    assert config.revision == COMMIT
    served.branches["main"] = OTHER
    assert model_folder(config).name == COMMIT
    assert model_fingerprint(config) == f"some/model@{COMMIT}"
    detector = pinned_detector(RegionsConfig(detector="some/detector"))
    assert detector.detector_revision == OTHER


def test_weights_are_left_to_the_nodes(served: servers.Hub) -> None:
    """Catches a driver that downloads what only actors need."""
    pinned_teacher(NAMED)
    files_asked = [path for path in served.asked if "/resolve/" in path]
    assert any(path.endswith("config.json") for path in files_asked)
    assert not any(path.endswith("safetensors") for path in files_asked)


def test_a_hub_that_is_away_leaves_the_cache(
    served: servers.Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an outage that stops a run whose model is here, or a cache taken without a word."""
    from huggingface_hub import constants

    pinned_teacher(NAMED)
    served.branches["main"] = OTHER
    served.failures = [503] * 4
    with caplog.at_level(logging.WARNING):
        assert pinned_teacher(NAMED).revision == COMMIT
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("the hub failed, again in") for line in lines] == [True] * 3 + [False]
    assert all("\n" not in line and len(line) < 200 for line in lines)
    assert COMMIT in lines[-1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pinned_teacher(NAMED).revision == COMMIT
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE"):
        pinned_teacher(TeacherConfig(model="some/model", revision="other"))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):  # the weights are not here
        model_folder(pinned_teacher(NAMED))


def test_a_revision_that_is_not_there_is_told_in_a_line(served: servers.Hub) -> None:
    """Catches the client's paragraphs, with request ids, as an error message."""
    with pytest.raises(ConfigError, match=r"no such revision.*revision") as caught:
        pinned_teacher(TeacherConfig(model="some/model", revision="v9"))
    assert "\n" not in str(caught.value)
    served.failures = [503] * 4
    with pytest.raises(ConfigError, match=r"status 503.*give its path.*HF_HUB_OFFLINE=1") as caught:
        pinned_teacher(TeacherConfig(model="some/other"))
    assert "\n" not in str(caught.value)


def test_a_clip_of_the_hub_is_known_by_its_commit(served: servers.Hub, tmp_path: Path) -> None:
    """Catches new weights under an old name that reuse the answers, or nodes with others."""
    clip = tmp_path / "clip"
    shutil.copytree(ClipModel("builtin:world_clip").resolve().removeprefix("local-dir:"), clip)
    settings = (clip / "open_clip_config.json").read_text()
    (clip / "open_clip_config.json").write_text(settings.replace('"world_clip"', '"some/clip"'))
    served.commits = {COMMIT: clip, OTHER: clip}
    config = pinned_teacher(TeacherConfig(model="open_clip:hf-hub:some/clip"))
    assert config.revision == COMMIT
    student = StudentConfig(model="hf-hub:some/clip")
    before = model_fingerprint(config), source_fingerprint(student)
    assert not any(path.endswith("safetensors") for path in served.asked)
    hub = hub_clip(config)
    assert hub is not None
    folder = hub.folder()
    assert folder.name == COMMIT
    scores = load_captioner(config).score([np.zeros((40, 40, 3), np.uint8)], ["a horse"])
    assert np.isfinite(scores.log_likelihoods).all()
    served.branches["main"] = OTHER
    assert hub.folder() == folder
    moved = pinned_teacher(TeacherConfig(model="open_clip:hf-hub:some/clip"))
    assert model_fingerprint(moved) == f"open_clip:hf-hub:some/clip@{OTHER}"
    assert before[0] == f"open_clip:hf-hub:some/clip@{COMMIT}"
    assert source_fingerprint(student) != before[1]
