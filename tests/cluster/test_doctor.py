"""The checks before a run: each fault is told with what to change, and only faults stop one."""

import json
import sys
import time

import pytest
from packaging.specifiers import SpecifierSet

from hts_ray import cli
from hts_ray.cluster import doctor
from hts_ray.cluster.doctor import Finding
from hts_ray.cluster.facts import node_facts, probe_path, probe_storage
from hts_ray.config import load_config
from hts_ray.store.provenance import versions

GIB = 1 << 30


def config(*overrides):
    return load_config(overrides=overrides)


def fact(**changes):
    """A node without a fault."""
    return {
        "host": "a", "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"},
        "gpus": [], "torch": {"cuda_build": None, "available": False, "devices": 0},
        "shm": (16 * GIB, 16 * GIB), "temporary": (100 * GIB, 60 * GIB),
        "temporary_path": "/tmp/ray", "run_dir": None, "files": (1024, 1048576),
        "storage": {"seconds": 0.1}, "object_store": 4 * GIB, "logical_gpus": 0.0,
        "clock_skew": 0.0, "sees_driver": True, **changes,
    }  # fmt: skip


H100 = {"name": "NVIDIA H100", "memory": "81559 MiB", "driver": "580.65", "cuda": "13.0"}
CUDA = {"cuda_build": "13.0", "available": True, "devices": 1}


def test_this_machine_is_examined_without_starting_ray(tmp_path, monkeypatch, capsys):
    """Would catch a check that starts Ray, leaves a file behind or cannot be read by a program."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = tmp_path / "runs" / "mine"
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--json", "--run-dir", str(run)])
    report = json.loads(capsys.readouterr().out)
    assert stop.value.code == (1 if report["problems"] else 0)
    found = {row["check"]: row for row in report["findings"]}
    assert found["storage"]["level"] == "ok"
    assert found["versions"]["level"] == "ok", report
    assert versions()["ray"] in found["versions"]["found"]
    assert {"gpu", "object store", "disk", "open files", "authentication"} <= set(found)
    assert not list(tmp_path.iterdir())


def test_the_terminal_shows_each_remedy(capsys):
    """Would catch a problem without advice, a wrong exit code or marks taken for markup."""
    findings = [
        Finding("ok", "none", "never shown", "gpu"),
        Finding("warning", "[/tmp] 3 GiB free", "have 10", "disk"),
        Finding("problem", "cannot write", "mend it", "storage"),
    ]
    assert doctor.print_findings(findings) == 1
    out = capsys.readouterr().out
    assert "[/tmp] 3 GiB free\n         -> have 10" in out
    assert "never shown" not in out
    assert "1 problems, 1 warnings" in out
    assert doctor.print_findings(findings[:2]) == 0


def test_storage_that_cannot_be_written_is_a_problem(tmp_path):
    """Would catch a run that fails when its first result is due."""
    blocked = tmp_path / "file"
    blocked.write_text("x")
    found = probe_storage(probe_path(str(blocked / "run")))
    assert found["step"] == "write"
    judged = doctor.judge_storage(fact(storage=found), config(f"run_dir={blocked}/run"))
    assert judged.level == "problem"
    assert "another run_dir" in judged.remedy
    apart = doctor.judge_storage(fact(sees_driver=False), config())
    assert apart.level == "problem"
    assert "does not see" in apart.found
    slow = doctor.judge_storage(fact(storage={"seconds": 9.0}), config())
    assert slow.level == "warning"


def test_gpus_are_judged_by_what_the_settings_ask_for():
    """Would catch advice to buy GPUs for a CPU run, or silence where torch cannot use one."""
    gpu = config("label.pool.num_gpus=1")
    judge = doctor.judge_gpu
    assert judge(fact(), config()).level == "ok"
    assert judge(fact(logical_gpus=None), gpu).level == "problem"
    assert judge(fact(), gpu).level == "ok"  # another node of the cluster may have them
    cpu_build = fact(gpus=[H100], logical_gpus=1.0)
    assert judge(cpu_build, config()).level == "warning"
    judged = judge(cpu_build, gpu)
    assert judged.level == "problem"
    assert "CPU build" in judged.found
    assert "TORCH_BACKEND" in judged.remedy
    assert judge(fact(gpus=[H100], logical_gpus=1.0, torch=CUDA), gpu).level == "ok"
    old = {**H100, "driver": "535.1", "cuda": "12.2"}
    judged = judge(fact(gpus=[old], torch={**CUDA, "available": False}), gpu)
    assert "knows CUDA up to 12.2" in judged.remedy
    judged = judge(fact(gpus=[H100, H100], torch=CUDA), gpu)
    assert "CUDA_VISIBLE_DEVICES" in judged.remedy
    assert judge(fact(logical_gpus=2.0), gpu).level == "problem"
    assert judge(fact(torch={"error": "no libcudart"}), config()).level == "problem"


def test_disks_and_limits():
    """Would catch a full disk, on which Ray starts no task, or a limit that ends a long run."""
    full = fact(temporary=(100 * GIB, 4 * GIB))
    assert doctor.judge_disk(full, config()).level == "problem"
    assert "95%" in doctor.judge_disk(full, config()).remedy
    assert doctor.judge_disk(fact(run_dir=(50 * GIB, 6 * GIB)), config()).level == "warning"
    assert doctor.judge_disk(fact(), config()).level == "ok"
    levels = [
        doctor.judge_open_files(fact(files=(256, hard)), config()).level
        for hard in (512, 4096, 65536, -1)
    ]
    assert levels == ["problem", "warning", "ok", "ok"]
    assert doctor.judge_object_store(fact(shm=(GIB // 16, 0)), config()).level == "warning"
    assert doctor.judge_object_store(fact(object_store=GIB / 4), config()).level == "warning"


def test_versions_are_compared_across_nodes():
    """Would catch a node of an older image, whose answers or pickles differ."""
    other = fact(host="b", versions={"python": "3.12.1", "ray": "2.60.0", "torch": "2.12.0"})
    found = {
        name: doctor.judge_package(name, None, [fact(), other])
        for name in ("python", "ray", "torch", "timm")
    }
    assert found["python"].level == "problem"
    assert found["torch"].level == "warning"
    assert "2.12.0 on b" in found["torch"].found
    assert found["ray"].level == found["timm"].level == "ok"
    assert doctor.judge_package("torch", None, [fact(), fact()]).level == "ok"


def test_unsupported_versions_are_named_with_the_supported_ones():
    """Would catch a cluster whose Ray or Python this package was never run with."""
    ranges = SpecifierSet(">=2.60,<2.61")
    assert doctor.judge_package("ray", ranges, [fact()]).level == "ok"
    old = fact(host="b", versions={"ray": "2.9.0"})
    judged = doctor.judge_package("ray", ranges, [fact(), old])
    assert judged.level == "problem"
    assert "2.9.0 on b, supported is <2.61,>=2.60" in judged.found
    missing = doctor.judge_package("timm", SpecifierSet(""), [fact()])
    assert missing.level == "problem"
    assert "not installed on a" in missing.found


def test_clocks():
    """Would catch nodes whose requests a store refuses because of their time."""
    assert doctor.judge_clocks([fact(clock_skew=0.4)]).level == "ok"
    assert doctor.judge_clocks([fact(), fact(clock_skew=-30)]).level == "warning"
    judged = doctor.judge_clocks([fact(host="b", clock_skew=-1200)])
    assert judged.level == "problem"
    assert "b is 1200 s behind" in judged.found


def test_authentication(monkeypatch, tmp_path):
    """Would catch an open cluster, a missing token, or one that other users can read."""
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert doctor.judge_auth(several_hosts=True).level == "problem"
    token.write_text("x")
    token.chmod(0o644)
    assert "chmod 600" in doctor.judge_auth(several_hosts=True).remedy
    token.chmod(0o600)
    assert doctor.judge_auth(several_hosts=True).level == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor.judge_auth(several_hosts=True).level == "warning"


@pytest.mark.parametrize(
    ("url", "level"),
    [
        ("127.0.0.1:8265", "ok"),
        ("[::1]:8265", "ok"),
        ("10.0.0.4:8265", "warning"),
        (None, "warning"),
    ],
)
def test_the_dashboard_belongs_on_this_machine_only(url, level):
    """Would catch a dashboard that takes jobs from the whole network."""
    assert doctor.judge_dashboard(url).level == level


def test_a_cluster_s_nodes_are_examined(ray_session, monkeypatch, tmp_path):
    """Would catch facts that do not come back from a node, or a stage that has no room there."""
    monkeypatch.setenv("RAY_ADDRESS", "whatever: Ray is up already")
    findings = doctor.examine(
        config(f"run_dir={tmp_path}", "label.pool.min_size=9", "label.pool.max_size=9")
    )
    found = {row.check: row for row in findings}
    assert "1 node with 4 CPUs and 2 GPUs" in found["cluster"].found
    assert found["clocks"].level == "ok", found["clocks"]
    assert found["storage"].level == "ok"
    assert found["paths"].level == "ok"
    assert found["room to label"].level == "problem"
    assert "label.pool.min_size = 9" in found["room to label"].found
    assert found["room to predict"].level == "ok"
    assert not list(tmp_path.iterdir())


def test_a_node_that_hangs_is_named(ray_session, monkeypatch, tmp_path):
    """Would catch a doctor that waits for ever, or calls a node healthy that did not answer."""

    def hang(*_):
        time.sleep(60)

    monkeypatch.setenv("RAY_ADDRESS", "whatever: Ray is up already")
    monkeypatch.setattr(doctor, "_NODE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(doctor, "node_facts", hang)
    started = time.monotonic()
    findings = doctor.examine(config(f"run_dir={tmp_path}"))
    assert time.monotonic() - started < 30
    [silent] = [row for row in findings if row.check.startswith("node ")]
    assert silent.level == "problem"
    assert "no answer in 1 s" in silent.found
    assert "storage" not in {row.check for row in findings}


def test_facts_travel_between_nodes(tmp_path):
    """Would catch facts that only this process can read, or a probe that stays behind."""
    found = node_facts(probe_path(str(tmp_path / "run")))
    assert json.loads(json.dumps(found))["storage"]["seconds"] >= 0
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["files"][1] == -1 or found["files"][1] >= found["files"][0]
    assert not (tmp_path / "run").exists()
