"""The real label stage on a cluster that starts without GPUs and grows when it is asked to."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fault_checks import check_no_orphans, outcome
from fault_cluster import Driver, FaultCluster, stopped_at_the_end
from fault_lab import SETTINGS, finish, require
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)

from hts_ray import cli
from hts_ray.demo.world import write_world

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

GPU_NODES = 4


def autoscaling_config(port: int) -> dict[str, object]:
    """Return the settings of Ray's provider of fake nodes, which are processes of this machine."""
    commands = ("initialization_commands", "setup_commands", "head_setup_commands",
                "worker_setup_commands", "head_start_ray_commands",
                "worker_start_ray_commands")  # fmt: skip
    return {
        "cluster_name": "fake",
        "max_workers": GPU_NODES,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
            "gpu-worker": {
                "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 157286400},
                "min_workers": 0,
                "max_workers": GPU_NODES,
                "node_config": {},
            },
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{name: [] for name in commands},
    }


ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    # As `ray up` and KubeRay set it: tells commands that nodes come when they are asked for.
    "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
}


def test_gpu_nodes_come_for_a_labeling_and_go_after_it(tmp_path: Path) -> None:
    """Would catch a pool that waits for GPUs it never asks for, or nodes that are paid for ever."""
    require("autoscaling")

    def head_options(port: int) -> list[str]:
        path = tmp_path / "autoscaling.json"
        path.write_text(json.dumps(autoscaling_config(port)))
        return [f"--autoscaling-config={path}"]

    images = 120
    write_world(tmp_path / "world", 560, images, 1)
    run_dir = str(tmp_path / "run")
    cli.main(["prepare", "hico", "--root", str(tmp_path / "world"), "--preset", "demo",
              "--run-dir", run_dir, *SETTINGS, f"label.pool.max_size={GPU_NODES}",
              f"ray.shared_paths=[{tmp_path}]",
              "label.teacher.model=builtin:dummy:0.8"])  # fmt: skip
    log = tmp_path / "driver.log"
    with FaultCluster(
        tmp_path, 0, environment=ENVIRONMENT, head_cpus=4, head_options=head_options
    ) as cluster:
        assert cluster.alive() == 1
        most = 1
        with stopped_at_the_end(Driver(cluster, log, ["label", "--run-dir", run_dir])) as driver:
            while driver.running:
                most = max(most, cluster.alive())
                time.sleep(0.5)
            finish(driver, "label")
        assert most == 1 + GPU_NODES
        found = outcome("label", run_dir)
        assert found["counts"]["rows_out"] == images
        assert found["counts"]["quarantined"] == 0
        deadline = time.monotonic() + 120
        while cluster.alive() > 1:
            assert time.monotonic() < deadline, "nodes that nobody uses stay"
            time.sleep(0.5)
        check_no_orphans(cluster, driver)
