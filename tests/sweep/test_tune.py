"""Trials on Ray Tune: stopped early, kept as they end, and never run twice."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hts_ray.config import SweepConfig, load_config
from hts_ray.errors import UserError
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, TrialLog, best_first
from hts_ray.sweep.space import Parameter, Space
from hts_ray.sweep.tune import Work, run_jobs, run_trials, trial_slots

THRESHOLD = "filter.positive_threshold"

# A trial's objective is its threshold, so the best trials are known; every seed leaves a mark.
PLUGIN = """
import time, uuid
from pathlib import Path
from hts_ray.errors import DataError

def measure(settings, seed, folder, seconds=0.0):
    value = settings["filter.positive_threshold"]
    time.sleep(seconds)
    (Path(folder) / f"{value}-{seed}-{uuid.uuid4().hex}").touch()
    if 0.3 < value < 0.4:
        raise DataError("nothing is left")
    if 0.4 < value < 0.45:
        raise ZeroDivisionError("a fault")
    return {"score": value, "seed": float(seed)}
"""


@pytest.fixture
def measure(plugins):
    (plugins / "swept_measure.py").write_text(PLUGIN)
    import swept_measure

    return swept_measure.measure


def space():
    return Space(load_config(overrides=[f"{THRESHOLD}=0.2"]), (Parameter(THRESHOLD, 0.2, 0.9),))


def marks(folder):
    """Return how often every (threshold, seed) was measured."""
    found = {}
    for path in Path(folder).iterdir():
        value, seed, _ = path.name.rsplit("-", 2)
        key = (float(value), int(seed))
        found[key] = found.get(key, 0) + 1
    return found


def test_trials_end_as_they_should(measure, tmp_path, ray_session):
    """Would catch hopeless trials that run on, the own settings stopped, and errors that spread."""
    config = SweepConfig(trials=24, repeats=3, concurrency=2, seed=5)
    told = []
    (tmp_path / "marks").mkdir()
    trials = run_trials(
        config, space(), measure, "score", folder=str(tmp_path),
        parameters={"folder": str(tmp_path / "marks")}, on_trial=told.append,
    )  # fmt: skip
    assert sorted(trials) == list(range(24))
    assert sorted(t.number for t in told) == list(range(24))
    measured = marks(tmp_path / "marks")
    for trial in trials.values():
        value = trial.settings[THRESHOLD]
        seeds = [seed for (v, seed) in measured if v == value]
        if 0.3 < value < 0.4:
            assert (trial.status, trial.message) == ("infeasible", "nothing is left")
            assert trial.objective is None
        elif 0.4 < value < 0.45:
            assert trial.status == "failed"
            assert "a fault" in trial.message
        else:
            assert trial.status == ("complete" if len(trial.reports) == 3 else "stopped")
            assert trial.objective == pytest.approx(value)
            assert trial.metrics["score"] == pytest.approx(value)
            assert len(seeds) == len(trial.reports)
    # The own settings have the lowest score of all, and are spared all the same.
    assert trials[OWN].status == "complete"
    assert [t.status for t in trials.values()].count("stopped") >= 3
    best = best_first(trials)[0]
    assert best.settings[THRESHOLD] == max(t.settings[THRESHOLD] for t in trials.values())
    assert not (tmp_path / "tune").exists()
    again = run_trials(config, space(), measure, "score", folder=str(tmp_path))
    assert again == trials  # and nothing was measured, or `folder` would have been missed


JOB = """
import json, time
from hts_ray.sweep.tune import report_fields

def work(config):
    job = json.loads(config["job"])
    if job == "dies":
        import os
        os._exit(1)
    report_fields("complete", {}, (), time.monotonic(), "" if job == "good" else f"{job}: no")
"""


def test_jobs_are_run_once_and_their_mistakes_told(plugins, tmp_path, ray_session):
    """Would catch a training whose failure is taken for a student, or that ends the others."""
    (plugins / "swept_job.py").write_text(JOB)
    import swept_job

    work = Work(swept_job.work, {"memory": 1 << 20}, at_a_time=3)
    told = run_jobs(work, ["good", "bad", "dies"], str(tmp_path / "tune"))
    assert told[:2] == ["", "bad: no"]
    assert told[2]
    assert not (tmp_path / "tune").exists()


DRIVER = """
import os, sys
import ray
from swept_measure import measure
from hts_ray.config import SweepConfig, load_config
from hts_ray.sweep.tune import run_trials
from hts_ray.sweep.space import Parameter, Space

ray.init(address=sys.argv[1], log_to_driver=False)
space = Space(load_config(overrides=["filter.positive_threshold=0.5"]),
              (Parameter("filter.positive_threshold", 0.5, 0.9),))
config = SweepConfig(trials=12, repeats=2, concurrency=2, reduction=1.2)
run_trials(config, space, measure, "score", folder=sys.argv[2],
           parameters={"folder": sys.argv[3], "seconds": 0.15})
"""


def test_a_killed_sweep_goes_on(measure, tmp_path, ray_session):
    """Would catch finished trials that are lost or run again after `kill -9`."""
    import ray

    (tmp_path / "marks").mkdir()
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    arguments = [ray.get_runtime_context().gcs_address, tmp_path / "sweep", tmp_path / "marks"]
    command = [sys.executable, str(script), *map(str, arguments)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = TrialLog(str(tmp_path / "sweep" / TRIALS_FOLDER))
    deadline = time.monotonic() + 120
    while len(log.read()) < 4:
        assert driver.poll() is None, driver.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {p.name: p.read_bytes() for p in Path(log.folder).glob("*.json")}
    assert 4 <= len(before) < 12
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    trials = log.read()
    assert sorted(trials) == list(range(12))
    measured = marks(tmp_path / "marks")
    for name, content in before.items():
        assert (Path(log.folder) / name).read_bytes() == content
        value = json.loads(content)["settings"][THRESHOLD]
        assert all(count == 1 for (v, _), count in measured.items() if v == value)


def test_slots_fit_into_the_cluster(ray_session):
    """Would catch trials that wait for CPUs which their neighbours hold, for ever."""
    slots = trial_slots(SweepConfig(trials=50, concurrency=16))
    assert slots.concurrency == 16
    assert slots.concurrency * slots.cpus <= 4  # what the tests' cluster has
    assert trial_slots(SweepConfig(trials=1)).concurrency == 1
    assert 1 <= trial_slots(SweepConfig(trials=50)).concurrency <= min(4, os.cpu_count() or 1)


def test_a_sweep_that_was_not_finished_says_so(tmp_path, measure, ray_session, monkeypatch):
    """Would catch a best setting that is chosen among half of the trials."""
    from ray import tune

    monkeypatch.setattr(tune.Tuner, "fit", lambda self: None)
    with pytest.raises(UserError, match="3 of 3 trials were not run"):
        run_trials(SweepConfig(trials=3), space(), measure, "score", folder=str(tmp_path))


def test_a_trial_that_cannot_be_kept_ends_the_sweep(measure, tmp_path, ray_session, monkeypatch):
    """Would catch a full disk that has trials run again and again, and end as failed ones."""
    (tmp_path / "marks").mkdir()
    config = SweepConfig(trials=4, repeats=1, concurrency=1)

    def run():
        parameters = {"folder": str(tmp_path / "marks")}
        return run_trials(
            config, space(), measure, "score", folder=str(tmp_path), parameters=parameters
        )

    def no_room(self, trial):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TrialLog, "write", no_room)
        with pytest.raises(OSError, match="No space left"):
            run()
    assert max(marks(tmp_path / "marks").values()) == 1, "a trial was run again"
    assert not any("No space" in trial.message for trial in run().values())
