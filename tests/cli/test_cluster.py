"""What `hts submit` refuses before anything is sent, and the plan it makes otherwise."""

import click
import pytest

from hts_ray.cli.cluster import parse_command
from hts_ray.cluster.submit import Job, check_on, plan_job
from hts_ray.engine.room import Cluster, Node
from hts_ray.errors import ConfigError, DataError
from hts_ray.store import storage


@pytest.fixture(autouse=True)
def unreachable_storage(monkeypatch):
    """Keep the planning of jobs from looking for settings in buckets that are not there."""
    monkeypatch.setattr(storage, "exists", lambda _: False)


def planned(folder, *arguments, **options):
    return plan_job(Job(arguments, working_dir=folder, **options), *parse_command(arguments))


def test_bad_usage_and_settings_are_refused_before_anything_is_sent(tmp_path):
    """Would catch minutes of waiting for a cluster that a mistyped setting ends."""
    with pytest.raises(ConfigError, match="did you mean regions"):
        planned(tmp_path, "label", "--run-dir", "s3://b/r", "label.regoins.whole=1")
    with pytest.raises(click.NoSuchOption):
        planned(tmp_path, "label", "--nonsense")
    for arguments in ((), ("lable",), ("submit", "--", "label")):
        with pytest.raises(ConfigError, match=r"one of .*label"):
            planned(tmp_path, *arguments)


def test_relative_paths_are_refused_unless_they_travel(tmp_path):
    """Would catch results written to a copy of the working directory, and lost with it."""
    with pytest.raises(ConfigError, match=r"run_dir = 'runs/x'.*goes away with the job"):
        planned(tmp_path, "label", "--run-dir", "runs/x")
    with pytest.raises(ConfigError, match=r"run_dir = 'runs/default'"):
        planned(tmp_path, "filter")
    run = ("--run-dir", "s3://b/r")
    with pytest.raises(ConfigError, match=r"--images = 'photos'"):
        planned(tmp_path, "predict", *run, "--images", "photos")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "mine.csv").write_text("name\na cat\n")
    plan = planned(tmp_path, "label", *run, "classes.source=./lists/mine.csv")
    assert [path for _, path in plan.paths] == ["s3://b/r"]
    with pytest.raises(ConfigError, match=r"classes.source = 'none.csv'"):
        planned(tmp_path, "label", *run, "classes.source=none.csv")
    assert planned(tmp_path, "report", "s3://b/r").config is None
    plan = planned(tmp_path, "predict", *run, "s3://b/1.png", "predict.batch_images=8")
    assert ("PATH", "s3://b/1.png") in plan.paths
    with pytest.raises(ConfigError, match=r"PATH = 'photos/1.png'"):
        planned(tmp_path, "predict", *run, "photos/1.png")


def test_a_run_directory_that_only_the_cluster_may_open_is_no_obstacle(tmp_path, monkeypatch):
    """Would catch a client without credentials of the storage being unable to submit."""

    def denied(path):
        raise DataError(f"{path}: access is denied")

    monkeypatch.setattr(storage, "exists", denied)
    plan = planned(tmp_path, "train", "--run-dir", "s3://private/r", "train.epochs=3")
    assert plan.config is not None
    assert plan.config.train.epochs == 3


def test_a_planned_job_is_checked_against_the_cluster(tmp_path):
    """Would catch a job that starts and then waits for ever, or writes to one node's disk."""
    nodes = tuple(Node(host, {"CPU": 2.0}) for host in "ab")
    plan = planned(tmp_path, "label", "--run-dir", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="run_dir"):
        check_on(plan, Cluster(nodes, autoscaling=False))
    remote = planned(tmp_path, "label", "--run-dir", "s3://b/r", "label.pool.num_gpus=1")
    with pytest.raises(ConfigError, match="0 GPUs"):
        check_on(remote, Cluster(nodes, autoscaling=False))
    assert check_on(remote, Cluster(nodes, autoscaling=True))
