"""Refusing, in figures, what a cluster could never run."""

import json

import pyarrow.dataset as pads
import pytest

from hts_ray.config import RayConfig, load_config
from hts_ray.engine import room as preflight
from hts_ray.engine.room import (
    Cluster,
    Node,
    check_paths,
    check_room,
    check_uris,
    demands,
    is_shared,
)
from hts_ray.errors import ConfigError
from hts_ray.images.manifest import open_manifest
from hts_ray.images.prepared import Candidate, manifest_table
from hts_ray.store.tables import write_table


def cluster(*nodes, autoscaling=False):
    """A cluster of (host, CPUs, GPUs) nodes with 16 GiB each."""
    return Cluster(
        tuple(Node(h, {"CPU": c, "GPU": g, "memory": 16 << 30}) for h, c, g in nodes), autoscaling
    )


TWO_HOSTS = cluster(("a", 8, 0), ("b", 8, 1))


def label_needs(*overrides):
    return demands(load_config(overrides=overrides), "label")


def test_an_actor_pool_leaves_room_for_what_feeds_and_resumes_it():
    """Would catch the known hang: a pool on every CPU, none for the filter of a resumed run."""
    needs = label_needs("label.pool.min_size=4", "label.pool.max_size=4")
    check_room(cluster(("a", 7, 0)), needs)
    told = r"label.pool.min_size = 4: .*7 in all; there are 6.*num-cpus=7"
    with pytest.raises(ConfigError, match=told):
        check_room(cluster(("a", 6, 0)), needs)


def test_gpus_that_are_not_there_are_told_apart_from_too_few():
    """Would catch waiting for ever, or advice that does not help."""
    one = label_needs("label.pool.num_gpus=1")
    check_room(TWO_HOSTS, one)
    with pytest.raises(ConfigError, match=r"label.pool.num_gpus = 1.0: .*0 GPUs can hold 0.*to 0"):
        check_room(cluster(("a", 8, 0)), one)
    three = label_needs("label.pool.num_gpus=1", "label.pool.min_size=3", "label.pool.max_size=3")
    told = r"3 workers of 1 CPU \+ 1 GPU wanted.*can hold 1.*to 1 or less"
    with pytest.raises(ConfigError, match=told):
        check_room(TWO_HOSTS, three)


def test_gpus_on_two_nodes_do_not_make_one_worker_of_two():
    """Would catch totals that hide that no single node is large enough."""
    pair = cluster(("a", 8, 1), ("b", 8, 1))
    with pytest.raises(ConfigError, match="than the largest node has"):
        check_room(pair, label_needs("label.pool.num_gpus=2"))
    check_room(cluster(("a", 8, 2)), label_needs("label.pool.num_gpus=2"))
    # Four quarters fit on one GPU, in spite of 0.1 + 0.2 != 0.3.
    tenths = ["label.pool.num_gpus=0.1", "label.pool.min_size=10", "label.pool.max_size=10"]
    check_room(cluster(("a", 16, 1)), label_needs(*tenths))


def test_memory_counts():
    """Would catch actors that no node has the memory for."""
    with pytest.raises(ConfigError, match="1 CPU \\+ 20 GiB wanted"):
        check_room(TWO_HOSTS, label_needs("label.pool.memory_gib=20"))


def test_where_nodes_come_by_themselves_nothing_is_refused():
    """Would catch an autoscaled cluster, which starts without GPU nodes, being refused."""
    notes = check_room(
        cluster(("head", 0, 0), autoscaling=True), label_needs("label.pool.num_gpus=1")
    )
    assert len(notes) == 1
    assert "waiting for more nodes" in notes[0]


def test_training_needs_its_workers_and_a_cpu_to_decode_on():
    """Would catch a trainer that waits for a placement group for ever."""
    config = load_config(overrides=["train.num_workers=4", "train.use_gpu=true"])
    with pytest.raises(ConfigError, match=r"train.num_workers = 4.*can hold 1"):
        check_room(TWO_HOSTS, demands(config, "train"))
    local = load_config(overrides=["train.num_workers=0"])
    check_room(cluster(("a", 1, 0)), demands(local, "train"))
    with pytest.raises(ConfigError, match=r"train\.num_workers"):
        check_room(cluster(("a", 1, 0)), demands(load_config(), "train"))


def test_prediction_on_cpus_is_made_of_tasks():
    """Would catch a small cluster refused for a pool that prediction does not have."""
    config = load_config(overrides=["predict.pool.min_size=8", "predict.pool.max_size=8"])
    check_room(cluster(("a", 2, 0)), demands(config, "predict"))


def test_the_pipeline_needs_what_its_stages_need():
    """Would catch a pipeline that gets stuck in its second stage."""
    config = load_config(overrides=["predict.pool.num_gpus=1"])
    with pytest.raises(ConfigError, match=r"predict\.pool"):
        check_room(cluster(("a", 8, 0)), demands(config, "pipeline"))
    check_room(cluster(("a", 0, 0)), demands(config, "filter"))
    nowhere = load_config(overrides=["filter.nodes.labels={tier: cpu}"])
    with pytest.raises(ConfigError, match=r"filter\.nodes"):
        check_room(cluster(("a", 8, 0)), demands(nowhere, "filter"))
    score = load_config(overrides=["score.pool.num_gpus=1"])
    with pytest.raises(ConfigError, match=r"score\.pool\.num_gpus"):
        check_room(cluster(("a", 8, 0)), demands(score, "score"))
    head = load_config(overrides=["train.trainable=head", "train.features.pool.num_gpus=1"])
    with pytest.raises(ConfigError, match=r"train\.features\.pool\.num_gpus"):
        check_room(cluster(("a", 8, 0)), demands(head, "train"))


def test_local_paths_are_refused_on_several_machines_only():
    """Would catch results that are spread over the disks of a cluster."""
    run = [("run_dir", "/data/runs/hico")]
    check_paths(cluster(("a", 8, 0), ("a", 8, 0)), (), run)  # two nodes of one machine
    check_paths(TWO_HOSTS, (), [("run_dir", "s3://bucket/run")])
    with pytest.raises(ConfigError, match=r"run_dir = '/data/runs/hico'.*shared_paths=\[/data\]"):
        check_paths(TWO_HOSTS, (), run)
    with pytest.raises(ConfigError, match="adds more"):
        check_paths(cluster(("head", 0, 0), autoscaling=True), (), run)
    check_paths(TWO_HOSTS, ("/data",), run)


def test_a_shared_folder_is_not_its_namesake():
    """Would catch /data2 taken for something below /data."""
    assert is_shared("/data/x", ["/data/"])
    assert is_shared("/data", ["/data"])
    assert not is_shared("/data2/x", ["/data"])
    assert not is_shared("/data/../etc", ["/data"])
    assert not is_shared("file:///data2/x", ["/data"])
    assert is_shared("file:///data/x", ["/data"])


def test_images_at_local_paths_are_found(tmp_path, monkeypatch):
    """Would catch a pass over a million images that quarantines every one on the other nodes."""
    uris = ["s3://b/1.png", "/mnt/images/2.png", "/home/me/3.png"]
    table = manifest_table(Candidate(u, u, "train") for u in uris)
    with pytest.raises(ConfigError, match=r"/home/me/3.png.*shared_paths=\[/home\]"):
        check_uris(TWO_HOSTS, ("/mnt",), table["uri"], "it")
    check_uris(TWO_HOSTS, ("/mnt", "/home/me"), table["uri"], "it")
    check_uris(TWO_HOSTS, (), table["uri"][:1], "it")
    # The same through the manifest's file and a table of labels, on a cluster that was joined.
    path = str(tmp_path / "manifest.parquet")
    write_table(path, table)
    monkeypatch.setattr(preflight, "joined_cluster", lambda _: TWO_HOSTS)
    config = load_config(overrides=["run_dir=s3://b/r", f"ray.shared_paths=[{tmp_path}]"])
    manifest = open_manifest(path)
    for images in ({"manifest": manifest}, {"labels": pads.dataset(table)}):
        with pytest.raises(ConfigError, match="are at local paths"):
            preflight.check_joined(config, "label", **images)
    monkeypatch.setattr(preflight, "joined_cluster", lambda _: cluster(("a", 8, 0)))
    assert (
        preflight.check_joined(config, "label", manifest=manifest, labels=pads.dataset(table)) == []
    )


def test_model_folders_are_told_from_hub_ids(tmp_path):
    """Would catch a hub id refused as a path, or a folder that only the driver has passed on."""
    folder = str(tmp_path)
    config = load_config(overrides=[f"label.teacher.model={folder}", "run_dir=s3://b/r"])
    assert ("label.teacher.model", folder) in list(preflight.worker_paths(config, "label"))
    hub = load_config(overrides=["label.teacher.model=Salesforce/blip-itm", "run_dir=s3://b/r"])
    assert list(preflight.worker_paths(hub, "label")) == [("run_dir", "s3://b/r")]


@pytest.mark.parametrize(
    ("labels", "status", "setting", "found"),
    [
        ({}, None, None, False),
        ({"ray.io/node-group": "gpu-spot"}, None, None, True),
        ({"ray.io/node-group": "fixed"}, None, False, False),
        ({}, {"autoscaler_report": {"active_nodes": {"node_4f": 1}}}, None, False),
        ({}, {"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}}, None, True),
        ({}, {}, True, True),
    ],
)
def test_autoscaling_is_found_out_or_said(labels, status, setting, found):
    """Would catch a hand-made cluster taken for one that grows, or the reverse."""
    rows = [{"host": "a", "resources": {"CPU": 4}, "labels": labels}]
    made = Cluster.of_nodes(rows, RayConfig(autoscaling=setting), json.dumps(status))
    assert made.autoscaling is found
    assert made.several_hosts is found


def test_the_cluster_that_was_joined_is_described(ray_session):
    """Would catch a change of Ray's node table going unnoticed."""
    found = preflight.joined_cluster(RayConfig())
    assert found.total("CPU") == 4
    assert found.total("GPU") == 2
    assert not found.several_hosts
    pool = ["label.pool.num_gpus=1", "label.pool.min_size=3", "label.pool.max_size=3"]
    config = load_config(overrides=pool)
    with pytest.raises(ConfigError, match="1 node with 4 CPUs and 2 GPUs can hold 2"):
        preflight.check_joined(config, "label")


def placed_cluster(*, autoscaling=False):
    """Two large GPUs, two small ones, and a node of CPUs, told apart by labels."""
    nodes = [
        Node("large", {"CPU": 8, "GPU": 2, "accelerator_type:A100": 1}, "", {"tier": "large"}),
        Node("small", {"CPU": 8, "GPU": 2, "accelerator_type:L4": 1}, "", {"tier": "small"}),
        Node("cpu", {"CPU": 16}, "", {"tier": "cpu", "ray.io/node-id": "17"}),
    ]
    return Cluster(tuple(nodes), autoscaling)


GPU_POOL = ["label.pool.num_gpus=1", "label.pool.min_size=3", "label.pool.max_size=3"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["label.pool.nodes.labels={tier: large}"], None),
        (["label.pool.nodes.labels={tier: 'in(small, large)'}", *GPU_POOL], None),
        (
            ["label.pool.nodes.labels={tier: '!small'}", "label.pool.nodes.accelerator_type=A100"],
            None,
        ),
        (["label.pool.nodes={labels: {tier: huge}, fallbacks: [{tier: small}]}"], None),
        (["label.pool.decode_nodes.labels={tier: cpu}"], None),
        (
            ["label.pool.nodes.labels={tier: huge}"],
            r"label.pool.nodes.labels = {'tier': 'huge'}: no node has these labels; there are"
            r" tier=large \(1 node\), tier=small \(1 node\), tier=cpu \(1 node\): .*--labels",
        ),
        (
            ["label.pool.decode_nodes.labels={tier: disk}"],
            r"label.pool.decode_nodes.labels = {'tier': 'disk'}",
        ),
        (
            ["label.pool.nodes={labels: {tier: large}, accelerator_type: H100}"],
            r"nodes.accelerator_type = 'H100': no node has such GPUs; there are A100, L4",
        ),
        (
            ["label.pool.nodes.labels={tier: large}", *GPU_POOL],
            r"label.pool.min_size = 3: .*can hold 2 where label.pool.nodes lets them.*to 2 or less",
        ),
    ],
)
def test_workers_are_placed_where_such_nodes_are(settings, told):
    """Catches a run that waits for ever for a label or a GPU that nothing has."""
    needs = label_needs(*settings)
    if told is None:
        assert check_room(placed_cluster(), needs) == []
        return
    with pytest.raises(ConfigError, match=told):
        check_room(placed_cluster(), needs)
    assert len(check_room(placed_cluster(autoscaling=True), needs)) == 1  # they may come


@pytest.mark.parametrize("command", ["prepare", "train", "predict", "score"])
def test_every_stage_is_placed(command):
    """Catches a stage whose setting is taken and forgotten."""
    where = {"prepare": "prepare", "train": "train"}.get(command, f"{command}.pool")
    names = ["nodes"] if command in {"prepare", "train"} else ["nodes", "decode_nodes"]
    for name in names:
        config = load_config(overrides=[f"{where}.{name}.labels={{tier: none}}"])
        with pytest.raises(ConfigError, match=rf"{where}\.{name}\.labels"):
            check_room(placed_cluster(), demands(config, command))


@pytest.mark.parametrize(
    "value", ["{tier: a b}", "{'a/b/c': x}", "{tier: 'in()'}", "{tier: '!!x'}", "{tier: -x}"]
)
def test_a_label_that_ray_would_refuse(value):
    """Catches Ray's traceback, minutes later, for a selector that cannot be parsed."""
    with pytest.raises(ConfigError, match="is no label"):
        load_config(overrides=[f"label.pool.nodes.labels={value}"])
    with pytest.raises(ConfigError, match="fallbacks"):
        load_config(overrides=["train.nodes={labels: {a: b}, fallbacks: [{a: c}]}"])
