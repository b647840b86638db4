"""Links that are cut while images are labeled, on hosts of their own."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from fault_checks import check_no_orphans, check_same, outcome
from fault_cluster import Driver, FaultCluster, Network, stopped_at_the_end
from fault_kinds import Scene, await_moment
from fault_lab import Lab, finish, require

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

# A node is given up after about ten seconds of silence, where Ray's defaults take a minute.
QUICK = {"RAY_health_check_timeout_ms": "4000", "RAY_health_check_failure_threshold": "2"}


def test_a_cut_link_costs_no_image(lab: Lab, tmp_path: Path) -> None:
    """Would catch images lost with a host that is cut off, or doubled when it comes back."""
    require("network", Network.missing())
    with (
        Network() as network,
        FaultCluster(tmp_path, environment=QUICK, network=network) as cluster,
    ):
        for seconds in (2.0, None):
            run_dir = lab.run_dir("label", str(tmp_path / f"run-{seconds}"))
            shared = ",".join(map(str, [*lab.folders, tmp_path]))
            settings = ["label.pool.min_size=2", f"ray.shared_paths=[{shared}]"]
            log = tmp_path / f"driver-{seconds}.log"
            arguments = ["label", "--run-dir", run_dir, *settings]
            with stopped_at_the_end(Driver(cluster, log, arguments)) as driver:
                scene = Scene(cluster, driver, "label", run_dir, lab.store, random.Random(0))
                await_moment(scene, 3, 0.0)
                network.cut(0)
                if seconds is None:
                    await_lost(cluster)
                    network.heal(0)
                    restart(cluster)
                else:
                    time.sleep(seconds)
                    network.heal(0)
                finish(driver, "label")
            check_same(outcome("label", run_dir), lab.expected("label"))
            check_no_orphans(cluster, driver)


def restart(cluster: FaultCluster) -> None:
    """Start the node that was given up again when it has ended, as a supervisor does."""
    deadline = time.monotonic() + 60
    while cluster.node_runs(0):
        assert time.monotonic() < deadline, "a node that was given up stays"
        time.sleep(0.2)
    cluster.start_node(0)


def await_lost(cluster: FaultCluster) -> None:
    """Wait until the head has given a node up."""
    deadline = time.monotonic() + 120
    while cluster.alive() == 3:
        assert time.monotonic() < deadline, "the cut was never noticed"
        time.sleep(0.2)
