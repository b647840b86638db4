"""`ray job submit` of the pipeline, on object storage, to a head started as users start one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import BUCKET, RAY, REPOSITORY

from hts_ray.demo.world import write_world
from hts_ray.store import storage


def submit(environment, variables, *arguments):
    """Submit a job from the repository and return the finished client's process."""
    runtime_env = json.dumps({"env_vars": variables})
    return subprocess.run(
        [*RAY, "job", "submit", "--working-dir", str(REPOSITORY), "--runtime-env-json",
         runtime_env, "--", "python", *arguments],
        env=environment, capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip


def upload(folder, uri):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_pipeline_runs_as_a_job_on_object_storage(head, s3, tmp_path, monkeypatch):
    """Would catch a stage that needs the submitter's paths or a disk, or a failure not told."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    write_world(tmp_path / "world", 556, 24, 16)
    root, run_dir = f"s3://{BUCKET}/world", f"s3://{BUCKET}/run"
    upload(tmp_path / "world", root)
    subprocess.run(
        [sys.executable, "-m", "hts_ray.cli", "prepare", "hico", "--root", root,
         "--preset", "demo", "--run-dir", run_dir, "classes.ids=[18, 4, 22, 152]"],
        check=True, cwd=REPOSITORY, capture_output=True,
    )  # fmt: skip
    settings = ["train.epochs=1", "label.pool.min_size=1", "label.pool.max_size=1",
                "filter.positive_threshold=0.2", "filter.negative_threshold=0.1"]  # fmt: skip
    done = submit(head, s3, "jobs/pipeline.py", "--run-dir", run_dir, *settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"mAP +[\d.]+ +[\d.]+", done.stdout), done.stdout[-3000:]
    (student,) = (name for name in storage.list_names(run_dir) if name.startswith("student-"))
    kept = storage.list_names(storage.join(run_dir, student))
    assert "model.safetensors" in kept
    assert "ray_train" not in kept
    wrong = submit(head, s3, "jobs/label.py", "--run-dir", run_dir, "label.regoins=1")
    assert wrong.returncode != 0
    assert "did you mean regions?" in wrong.stdout
