"""Shared fixtures: one Ray cluster a session, and tiny captioners in their on-disk format."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))  # pytest's import mode hides what lies beside
import servers
import tiny_models

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # both are read when ray is imported
os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")  # as hts_ray.engine.session sets it
# On a crowded machine Ray's node agent starts slowly, and the node then aborts.
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")
os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose by threads that wait for cores
# Modules that tests write here can be imported by the workers of the shared cluster too.
PLUGINS = tempfile.mkdtemp(prefix="hts-plugins-")
atexit.register(shutil.rmtree, PLUGINS, ignore_errors=True)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PLUGINS, os.environ.get("PYTHONPATH")]))
sys.path.insert(0, PLUGINS)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("a test marked gpu was selected on a machine without one")
    if item.get_closest_marker("vllm") and not find_spec("vllm"):
        raise RuntimeError("tests marked vllm need vLLM: make test-vllm")


@pytest.fixture(scope="session")
def plugins() -> Path:
    """Return a folder whose modules tests and their Ray workers can import."""
    return Path(PLUGINS)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster of 4 logical CPUs and 2 logical GPUs."""
    import ray

    for attempt in range(3):
        try:
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=2,
                include_dashboard=False,
                object_store_memory=200_000_000,
                log_to_driver=False,
            )
            break
        except Exception:  # Ray gives a node 30 s to start, too little on a crowded machine
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a head node of 4 logical CPUs with tokens; gives the environment of its clients."""
    with servers.ray_head(tmp_path_factory.mktemp("head")) as environment:
        yield environment


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start an S3 server with one bucket; gives the environment of its clients."""
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what saves a captioner of `tiny_models`, once a session."""
    saved: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in saved:
            folder = tmp_path_factory.mktemp("tiny") / name
            build = tiny_models.BUILDERS.get(name) or getattr(tiny_models, name)
            saved[name] = build(folder)
        return saved[name]

    return path


@pytest.fixture(scope="session")
def tiny_blip_path(tiny_path: Callable[[str], Path]) -> Path:
    """Save a BLIP of 2 + 2 layers, stored as float16 like the packaged one."""
    return tiny_path("blip")


@pytest.fixture(scope="session")
def tiny_git_path(tiny_path: Callable[[str], Path]) -> Path:
    """Save a GIT of 2 + 2 layers."""
    return tiny_path("git")


@pytest.fixture(scope="session")
def tiny_vit_bert_path(tiny_path: Callable[[str], Path]) -> Path:
    """Save a VisionEncoderDecoder of ViT and BERT."""
    return tiny_path("vit_bert")
