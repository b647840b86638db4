"""A command as a job of a cluster: what it is made of, and what comes back."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image
from servers import BUCKET, REPOSITORY

from hts_ray.cluster import submit
from hts_ray.cluster.submit import DETACHED, STOPPED, Job, exit_code, parse_env
from hts_ray.errors import ConfigError, UserError
from hts_ray.store import storage
from hts_ray.store.run import find_stage
from hts_ray.store.tables import read_table


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 7, 7),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, STOPPED),
    ],
)
def test_the_exit_code_is_the_job_s(status, driver, code):
    """Would catch success told of a job that failed or was stopped."""
    assert exit_code(SimpleNamespace(status=status, driver_exit_code=driver)) == code


def test_variables_and_requirements(tmp_path, monkeypatch):
    """Would catch a secret that has to be typed, or a requirement that breaks the cluster."""
    monkeypatch.setenv("SECRET", "a=b")
    assert parse_env(["X=1=2", "SECRET", "EMPTY="]) == {"X": "1=2", "SECRET": "a=b", "EMPTY": ""}
    for wrong in ("NOT_SET_ANYWHERE", "=x"):
        with pytest.raises(ConfigError, match="KEY=VALUE"):
            parse_env([wrong])
    file = tmp_path / "requirements.txt"
    file.write_text("# mine\n\nnum2words>=0.5  # numbers\n--no-deps\n")
    lines = submit.read_requirements(file)
    assert lines == ("num2words>=0.5  # numbers", "--no-deps")
    job = Job(("label",), requirements=lines, installer="pip", env={"A": "1"})
    assert job.runtime_env(tmp_path / "x.zip") == {
        "working_dir": str(tmp_path / "x.zip"), "env_vars": {"A": "1"}, "pip": list(lines),
    }  # fmt: skip
    file.write_text("ray[data]==2.50\n")
    with pytest.raises(ConfigError, match="cluster's Ray"):
        submit.read_requirements(file)
    with pytest.raises(ConfigError, match="none"):
        submit.read_requirements(tmp_path / "none")


def test_arguments_reach_the_job_as_they_were_given():
    """Would catch a shell that splits or expands what the user quoted."""
    job = Job(("label", "--run-dir", "s3://b/a b", "classes.ids=[1, 2]", "x=$HOME"))
    assert job.entrypoint == (
        "python -m hts_ray.cli label --run-dir 's3://b/a b' 'classes.ids=[1, 2]' 'x=$HOME'"
    )


def test_a_server_s_traceback_is_told_in_its_last_line():
    """Would catch a page of a server's code in place of the reason."""
    text = "Request failed with status code 500: Traceback (most recent call last):\n  File x\n"
    text += "ValueError: Job with submission_id one already exists.\n."
    told = submit._last_line(RuntimeError(text))
    assert told == "ValueError: Job with submission_id one already exists."
    assert submit._last_line(RuntimeError("refused")) == "refused"


class _Client:
    """A job server: states and logs, one a look, which may fail."""

    def __init__(self, statuses, logs=(), stops=True):
        self.statuses, self.logs, self.stops = list(statuses), list(logs), stops
        self.stopped = False

    def get_address(self):
        return "http://127.0.0.1:8265"

    def get_job_info(self, job_id):
        from ray.job_submission import JobStatus

        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        status = "STOPPED" if self.stopped else status
        return SimpleNamespace(status=JobStatus(status), driver_exit_code=None, message="why")

    def stop_job(self, job_id):
        self.stopped = True

    def get_job_logs(self, job_id):
        log = self.logs.pop(0) if self.logs else ""
        if isinstance(log, BaseException):
            raise log
        return log


def test_a_lost_connection_is_taken_up_again(capsys, monkeypatch):
    """Would catch a tunnel that breaks for a moment told as failure, and lines lost or repeated."""
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    logs = ["a\ntw", RuntimeError("closed"), "a\n", "a\ntwo\nb\n"]
    statuses = ["RUNNING", "RUNNING", ConnectionError("refused"), "RUNNING", "SUCCEEDED"]
    assert submit.wait(_Client(statuses, logs), "job", tell=lambda _: None) == 0
    assert capsys.readouterr().out == "a\ntwo\nb\n"
    monkeypatch.setattr(submit, "_LOST_SECONDS", -1.0)
    with pytest.raises(UserError, match="--attach job"):
        submit.wait(_Client([ConnectionError("refused")]), "job", tell=lambda _: None)


def test_a_job_that_never_ran_says_why(monkeypatch):
    """Would catch a failed installation on the nodes, or a wait for room, that leaves no word."""
    told = []
    assert submit.wait(_Client(["FAILED"]), "job", tell=told.append) == 1
    assert told[0] == "why"
    told.clear()
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    monkeypatch.setattr(submit, "_PATIENCE_SECONDS", -1.0)
    assert submit.wait(_Client(["PENDING", "PENDING", "SUCCEEDED"]), "job", tell=told.append) == 0
    assert told == ["waiting: why", "job job: succeeded"]


def test_an_interrupt_detaches_or_stops(monkeypatch):
    """Would catch Ctrl-C that kills a job of days, or that leaves no way back to it."""
    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    told = []
    client = _Client(["RUNNING"], [KeyboardInterrupt()])
    assert submit.wait(client, "job", tell=told.append) == DETACHED
    assert not client.stopped
    assert any("--attach job" in line for line in told)
    assert any("ray job stop" in line for line in told)
    client = _Client(["RUNNING"], [KeyboardInterrupt()])
    assert submit.wait(client, "job", tell=told.append, ask=lambda: True) == STOPPED
    assert client.stopped

    def interrupted_again():
        raise KeyboardInterrupt

    client = _Client(["RUNNING"], [KeyboardInterrupt()])
    assert submit.wait(client, "job", tell=told.append, ask=interrupted_again) == DETACHED
    assert not client.stopped


def test_no_server_and_a_refused_token_are_told(head, monkeypatch):
    """Would catch a traceback, or --address overruled by a variable of the environment."""
    for name, value in head.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"no job server answers at http://127\.0\.0\.1:9"):
        submit.connect("http://127.0.0.1:9")
    assert os.environ["RAY_API_SERVER_ADDRESS"] == head["RAY_API_SERVER_ADDRESS"]


def hts_submit(environment, *arguments, **options):
    """Run `hts submit` from another folder than the repository; return its process."""
    return subprocess.Popen(
        [sys.executable, "-m", "hts_ray.cli", "submit", *arguments],
        env={**environment, "PYTHONPATH": str(REPOSITORY)}, text=True, stdout=subprocess.PIPE,
        **{"stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options},
    )  # fmt: skip


def test_without_a_token_the_client_says_what_to_set(head, tmp_path):
    """Would catch Ray's long text about tokens, or a wrong one told as an unreachable server."""
    environment = {k: v for k, v in head.items() if not k.startswith("RAY_AUTH")}
    environment["HOME"] = str(tmp_path)
    submitted = ["--working-dir", str(tmp_path), "--", "report", "s3://b/r"]
    _, err = hts_submit(environment, *submitted).communicate(timeout=240)
    assert "export RAY_AUTH_MODE=token" in err, err
    environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 64)
    process = hts_submit(environment, *submitted)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "must hold the cluster's token" in err, err
    assert "Traceback" not in err


def driver_of(command, deadline):
    """Return the process that runs a command as a job's driver."""
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if line[1:4] == ["-m", "hts_ray.cli", command] and "submit" not in line:
                return process
        time.sleep(0.2)
    raise AssertionError(f"no driver of {command}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_label_pass_goes_on_on_object_storage(head, s3, tmp_path, monkeypatch):
    """Would catch a killed job told as success, work done twice or images lost on a bucket."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    root, run_dir = f"s3://{BUCKET}/killed/images", f"s3://{BUCKET}/killed/run"
    for number in range(48):
        path = tmp_path / "image.png"
        Image.new("RGB", (40, 30), (number * 5, 0, 0)).save(path)
        storage.write_bytes(f"{root}/{number:02d}.png", path.read_bytes())
    (tmp_path / "classes.csv").write_text("name\na red thing\na blue thing\n")
    settings = ["classes.source=classes.csv", "label.teacher.model=builtin:dummy:0.02",
                "label.block_rows=4", "label.batch_images=4"]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "hts_ray.cli", "prepare", "folder", "--root", root,
         "--run-dir", run_dir, *settings],
        check=True, cwd=tmp_path, capture_output=True, env={**head, **s3},
    )  # fmt: skip
    variables = [option for name in s3 for option in ("--env", name)]
    job = [*variables, "--", "label", "--run-dir", run_dir]
    client = hts_submit({**head, **s3}, *job, cwd=tmp_path)
    driver = driver_of("label", time.monotonic() + 120)
    folder = None
    while client.poll() is None and folder is None:
        names = [name for name in storage.list_names(run_dir) if name.startswith("region_scores-")]
        committed = [
            file
            for name in names
            for file in storage.list_names(f"{run_dir}/{name}/checkpoint")
            if not file.endswith(".pending.parquet")
        ]
        folder = names[0] if len(committed) >= 2 else None
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    out, err = client.communicate(timeout=240)
    assert client.returncode == 137, out[-2000:] + err[-2000:]
    assert "1 node with 4 CPUs and 0 GPUs" in err
    again = hts_submit({**head, **s3}, *job, cwd=tmp_path)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, out[-2000:] + err[-2000:]
    stage = find_stage(run_dir, "region_scores")
    assert stage is not None
    assert stage.stats["rows_resumed"] >= 8
    assert stage.stats["rows_out"] == 48
    ids = read_table(stage.path, ["image_id"])["image_id"].to_pylist()
    assert len(ids) == len(set(ids)) == 48


def ask(environment, method, path, **body):
    """Ask the job server itself, as other clients do."""
    request = urllib.request.Request(
        environment["RAY_API_SERVER_ADDRESS"] + path,
        method=method,
        data=json.dumps(body).encode(),
        headers={
            "Authorization": f"Bearer {Path(environment['RAY_AUTH_TOKEN_PATH']).read_text()}",
            "Content-Type": "application/json",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def test_detaching_attaching_and_stopping(head, tmp_path):
    """Would catch Ctrl-C that takes the job along, or a stopped job that counts as success."""
    script = "import time; print('up', flush=True); time.sleep(300)"
    entrypoint = shlex.join(["python", "-c", script])
    job_id = ask(head, "POST", "/api/jobs/", entrypoint=entrypoint)["submission_id"]
    follower = hts_submit(head, "--attach", job_id, cwd=tmp_path)
    assert "up\n" in iter(follower.stdout.readline, "")
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=240)
    assert follower.returncode == DETACHED, err
    assert f"--attach {job_id}" in err
    assert ask(head, "GET", f"/api/jobs/{job_id}")["status"] == "RUNNING"
    terminal, inside = pty.openpty()
    follower = hts_submit(head, "--attach", job_id, cwd=tmp_path, stdin=inside, stderr=inside)
    assert "up\n" in iter(follower.stdout.readline, "")
    follower.send_signal(signal.SIGINT)
    os.write(terminal, b"stop\n")
    follower.communicate(timeout=240)
    os.close(inside)
    shown = os.read(terminal, 1 << 16).decode()
    assert follower.returncode == STOPPED, shown
    assert "stop the job, or detach" in shown
    assert "stopped" in shown
    assert ask(head, "GET", f"/api/jobs/{job_id}")["status"] == "STOPPED"
