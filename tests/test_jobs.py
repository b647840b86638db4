"""`ray job submit` of the pipeline against a head started as users start one."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hts_ray.data.synthetic import write_world

REPOSITORY = Path(__file__).resolve().parent.parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(count):
    """Return ports outside the range that Ray's workers take."""
    found = []
    for port in range(21000, 60000, 7):
        if not listens(port):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free port")


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def head(tmp_path_factory):
    """A head node with token authentication; yields the environment of its clients."""
    temporary = Path(f"/tmp/hts-{os.getpid()}")  # short: Ray's sockets live below it
    port, dashboard, client = free_ports(3)
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("a" * 64)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
        # As in an activated environment: the job's `python` is the one with the package.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    log = (folder / "head.log").open("w")
    process = subprocess.Popen(
        [*RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--ray-client-server-port={client}", f"--temp-dir={temporary}", "--num-cpus=4",
         "--dashboard-agent-listen-port=0", "--object-store-memory=200000000"],
        env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while not listens(dashboard):
        assert process.poll() is None, (folder / "head.log").read_text()
        assert time.monotonic() < deadline, (folder / "head.log").read_text()
        time.sleep(0.5)
    yield environment
    # Not terminated: `ray start --block` would drain the node for half a minute.
    for started in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.kill()
    process.wait(60)


def submit(environment, *arguments):
    """Submit a job from the repository and return the finished client's process."""
    return subprocess.run(
        [*RAY, "job", "submit", "--working-dir", str(REPOSITORY), "--", "python", *arguments],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_the_pipeline_runs_as_a_job(head, tmp_path):
    """Would catch an entry point that needs the submitter's paths, or failure told as success."""
    write_world(tmp_path / "world", 556, 24, 16)
    run_dir = tmp_path / "run"
    subprocess.run(
        [sys.executable, "-m", "hts_ray.cli", "prepare", "hico", "--root", str(tmp_path / "world"),
         "--preset", "demo", "--run-dir", str(run_dir), "classes.ids=[18, 4, 22, 152]"],
        check=True, cwd=REPOSITORY, capture_output=True,
    )  # fmt: skip
    settings = ["train.epochs=1", "label.pool.min_size=1", "label.pool.max_size=1",
                "filter.positive_threshold=0.2", "filter.negative_threshold=0.1"]  # fmt: skip
    done = submit(head, "jobs/pipeline.py", "--run-dir", str(run_dir), *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"mAP +[\d.]+ +[\d.]+", done.stdout), done.stdout[-3000:]
    assert list(run_dir.glob("student-*/model.safetensors"))
    wrong = submit(head, "jobs/label.py", "--run-dir", str(run_dir), "label.regoins=1")
    assert wrong.returncode != 0
    assert "did you mean regions?" in wrong.stdout
