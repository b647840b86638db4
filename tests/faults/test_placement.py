"""Work goes to the nodes that the settings name, on a cluster of several."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fault_cluster import stopped_at_the_end
from fault_lab import Lab, finish, require
from servers import REPOSITORY

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

WHERE = """
import ray
from hts_ray.config import NodesConfig, RayConfig
from hts_ray.engine.blocks import OnRay
from hts_ray.engine.session import ray_cluster

def place(number):
    there = ray.get_runtime_context().get_node_labels().get("place", "head")
    return int(there[-1]) if there != "head" else -1, 0

with ray_cluster(RayConfig()):
    for labels in {"place": "node-1"}, {"place": "!node-1"}, {"place": "in(node-0, node-7)"}:
        nodes = NodesConfig(labels=labels)
        print(sorted({where for where, _ in OnRay(nodes).map(place, zip(range(6)))}))
    nodes = NodesConfig(labels={"place": "nowhere"}, fallbacks=({"place": "node-0"},))
    print(sorted({where for where, _ in OnRay(nodes).map(place, zip(range(6)))}))
"""


def test_tasks_run_where_labels_say(lab: Lab) -> None:
    """Catches a selector that Ray never gets, or that it reads in another way than we check it."""
    require("placement")
    lab.cluster.repair()
    environment = {**lab.cluster.environment, "RAY_ADDRESS": lab.cluster.address}
    done = subprocess.run(
        [sys.executable, "-c", WHERE], env=environment, cwd=REPOSITORY, timeout=240,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    only, other, one_of, instead = done.stdout.splitlines()[-4:]
    assert (only, one_of, instead) == ("[1]", "[0]", "[0]")
    assert set(json.loads(other)) <= {-1, 0}


def test_a_teacher_runs_where_its_pool_says(lab: Lab, tmp_path: Path) -> None:
    """Catches a pool that starts on any node, and labels that are refused when they are there."""
    require("placement")
    run_dir = lab.run_dir("label", str(tmp_path / "run"))
    driver = lab.start("label", run_dir, "label.pool.nodes.labels={place: node-1}",
                       "label.pool.max_size=1")  # fmt: skip
    held: list[set[str]] = [set(), set()]
    with stopped_at_the_end(driver):
        while driver.running:
            for number in range(2):
                held[number] |= {name for name in lab.cluster.workers(number) if "Teacher" in name}
        finish(driver, "label")
    assert held[1]
    assert not held[0]
    wrong = lab.start("label", lab.run_dir("label", str(tmp_path / "wrong")),
                      "label.pool.nodes.labels={place: node-9}")  # fmt: skip
    assert wrong.wait(120) == 2
    told = " ".join(wrong.output.split())
    assert "no node has these labels; there are " in told
    assert "place=node-0 (1 node)" in told
    assert "place=node-1 (1 node)" in told
