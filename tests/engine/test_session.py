"""Joining and starting Ray."""

import logging
import os
import subprocess
import sys

import pytest

from hts_ray.config import PoolConfig, RayConfig
from hts_ray.engine.session import _NOISE, _local_cpus, _protect_token, ray_cluster
from hts_ray.errors import ConfigError, UserError


def test_a_running_cluster_is_joined_and_left_running(ray_session, monkeypatch):
    """Would catch a stage that shuts down the cluster of its caller, or asks it for a token."""
    import ray

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with ray_cluster(RayConfig()):
        assert ray.is_initialized()
        assert "RAY_AUTH_MODE" not in os.environ
    assert ray.is_initialized()


def test_unreachable_address_is_a_clear_error(monkeypatch):
    """Would catch a Ray traceback for a mistyped address."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**_):
        raise ConnectionError("nothing listens there")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(UserError, match=r"10\.0\.0\.9:6379: nothing listens"),
        ray_cluster(RayConfig(address="10.0.0.9:6379")),
    ):
        pass


def test_local_clusters_ask_for_a_token(monkeypatch):
    """Would catch an open local cluster, whose ports listen on every interface."""
    import ray

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    seen = {}

    def start(**options):
        seen.update(options, mode=os.environ.get("RAY_AUTH_MODE"))

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_cluster(RayConfig(num_cpus=3)):
        pass
    assert seen["mode"] == "token"
    assert seen["include_dashboard"] is False
    assert seen["num_cpus"] == 3


def test_a_script_may_use_ray_before_this_package(tmp_path):
    """Would catch a local cluster that never starts: its nodes ask for tokens, its driver not."""
    code = """
import ray
from hts_ray import stages
started = ray.remote(lambda: True)
stages.start(stages.settings("demo", run_dir="run", ray={"num_cpus": 5}))
print(ray.get(started.remote()))
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    for name in ("RAY_AUTH_MODE", "RAY_ADDRESS"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert done.stdout.split() == ["True"], done.stderr
    assert "Set ray log level" not in done.stderr  # nor the notice that comes from C++
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("debug", "level"), [("", logging.CRITICAL), ("1", logging.ERROR)])
def test_ray_prints_no_traceback_before_the_command_s_own_words(debug, level, monkeypatch):
    """Would catch a page of Ray's insides in front of `a disk is full`, or none when asked for."""
    import ray

    monkeypatch.setenv("HTS_DEBUG", debug)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_cluster(RayConfig(num_cpus=3)):
        assert logging.getLogger("ray.data").level == level
        assert logging.getLogger("ray.train").level == level


RETRIED = (
    "Task MapWorker(MapBatches(TeacherActor)).{} failed. There are infinite retries remaining, so"
    " the task will be retried. Error: {}"
)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (RETRIED.format("get_location", 'Traceback (most recent call last):\n\n  File "a"\n'), 0),
        (RETRIED.format("submit", "The actor is temporarily unavailable: recvmsg: reset"), 1),
        ("WARNING: 8 PYTHON worker processes have been started on node: 1f with address: ::1", 0),
        ("The node with node id: 1f and address: 10.0.0.2 has been marked dead", 1),
    ],
)
def test_nodes_tell_the_terminal_what_a_user_can_use(message, shown):
    """Would catch pages of a traceback of what is tried again, or a lost node left untold."""
    from ray._private.ray_logging import LogDeduplicator

    printed = LogDeduplicator(5, None, _NOISE).deduplicate({"pid": "raylet", "lines": [message]})
    assert [line for batch in printed for line in batch["lines"]] == [message] * shown


def test_pools_leave_cpus_for_what_feeds_them():
    """Would catch a run that waits for ever: every CPU held by a teacher, none to decode on."""
    pool = PoolConfig(min_size=8, max_size=40, num_gpus=1)
    assert _local_cpus(RayConfig(), [pool]) >= 43
    assert _local_cpus(RayConfig(num_cpus=11), [pool]) == 11
    with pytest.raises(ConfigError, match=r"ray.num_cpus = 10: .*take 8.*set 11 or more"):
        _local_cpus(RayConfig(num_cpus=10), [pool])
    assert _local_cpus(RayConfig(num_cpus=1), []) == 1


def test_the_token_file_is_for_its_owner_only(monkeypatch, tmp_path):
    """Would catch a token that other users of the machine can read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    _protect_token()
    assert token.stat().st_mode & 0o777 == 0o600
