"""What `auto` stands for: devices and precision by what the nodes offer."""

from __future__ import annotations

import pytest

from hts_ray.config import HtsConfig, RayConfig, load_config
from hts_ray.engine import devices
from hts_ray.engine.devices import Choice, Gpus, Offer, choose_devices, cluster_offer
from hts_ray.engine.room import Cluster, Node
from hts_ray.errors import ConfigError

A100 = Gpus("A100-SXM4-80GB", 8, 1, bfloat16=True, gib=79.3)
T4 = Gpus("Tesla T4", 1, 2, bfloat16=False, gib=14.6)
UNUSED = Gpus("GPU", 2, trouble="torch is a CPU build")


def chosen(*gpus: Gpus, command: str = "label", settings: tuple[str, ...] = (), **more) -> Choice:
    offer = Offer(gpus, autoscaling=more.pop("autoscaling", False))
    return choose_devices(load_config(overrides=settings), command, offer, **more)


def label_of(choice: Choice) -> tuple[object, str]:
    return choice.config.label.pool.num_gpus, choice.config.label.teacher.dtype


def test_precision_is_what_every_gpu_has():
    """Would catch bfloat16 on an older GPU of a mixed cluster, and half precision on a CPU."""
    assert label_of(chosen()) == (0, "float32")
    assert label_of(chosen(A100)) == (1, "bfloat16")
    assert label_of(chosen(T4)) == (1, "float16")
    assert label_of(chosen(A100, T4)) == (1, "float16")
    assert label_of(chosen(UNUSED)) == (0, "float32")
    assert label_of(chosen(A100, settings=("label.pool.num_gpus=0",))) == (0, "float32")
    wanted = ("label.teacher.dtype=float32", "label.pool.num_gpus=0.5")
    assert label_of(chosen(A100, settings=wanted)) == (0.5, "float32")


def test_a_run_keeps_the_precision_that_it_began_with():
    """Would catch a pass that starts anew because the cluster has other nodes than yesterday."""
    before = {"dtype": "float32", "num_gpus": 0.0}
    choice = chosen(A100, earlier=before)
    assert label_of(choice) == (1, "float32")
    assert "note: float32 as this run began; label.teacher.dtype=bfloat16 would" in choice.lines[1]
    assert label_of(chosen(earlier={"dtype": "bfloat16"}))[1] == "bfloat16"
    asleep = chosen(autoscaling=True, earlier={"dtype": "bfloat16", "num_gpus": 1.0})
    assert label_of(asleep) == (1, "bfloat16")


def test_a_teacher_gets_as_many_gpus_as_its_weights_need():
    """Would catch memory running out on a worker, where the sizes were known before."""

    def of(gib: float, *gpus: Gpus) -> object:
        return label_of(chosen(*gpus, weights_gib=lambda dtype: gib))[0]

    assert of(10.0, T4) == 1
    assert of(70.0, A100) == 2
    assert of(500.0, A100) == 8
    assert of(70.0, A100, T4) == 2  # no node of T4 has two: Ray places no actor there
    for gib, gpus in ((20.0, (A100, T4)), (2000.0, (A100,)), (14.0, (T4,))):
        with pytest.raises(ConfigError, match=f"{gib:g}.* GiB, too much for") as caught:
            of(gib, *gpus)
        assert caught.value.field == "label.pool.num_gpus"


ENDPOINT = tuple(
    f"label.teacher.{setting}"
    for setting in ("engine=openai", "endpoint=http://h/v1", "model=m", "mode=captions")
)


def test_a_model_behind_an_endpoint_takes_no_gpu(monkeypatch):
    """Would catch GPUs held, or a node started, for actors that only ask a server."""
    choice = chosen(A100, settings=ENDPOINT)
    assert label_of(choice) == label_of(chosen(settings=ENDPOINT)) == (0, "float32")
    assert not choice.lines
    regions = (*ENDPOINT, "label.regions.detector=some/detector")
    assert label_of(chosen(A100, settings=regions)) == (1, "float32")
    monkeypatch.setattr(devices, "joined_cluster", lambda _: Cluster((), autoscaling=True))
    monkeypatch.setattr(devices, "on_ray", lambda: True)
    monkeypatch.setattr(devices, "startable_gpus", lambda: [("A100", 8, 1)])
    monkeypatch.setattr(devices, "_ask", lambda *_, **__: pytest.fail("a node was asked for"))
    cluster_offer(load_config(overrides=ENDPOINT), "label")


def test_every_stage_of_a_command_gets_devices():
    """Would catch a pipeline whose later stages stay on CPUs, or a stage that is left `auto`."""
    config = chosen(A100, command="pipeline").config
    assert (config.label.pool.gpus, config.predict.pool.gpus, config.train.gpu) == (1, 1, True)
    assert config.train.features.pool.gpus == 1
    assert config.score.pool.num_gpus == "auto"  # not of this command
    assert chosen(A100, command="score").config.score.pool.gpus == 1
    swept = chosen(command="sweep").config.train
    assert (swept.use_gpu, swept.cpus_per_worker) == (False, 1)
    few = chosen(T4, command="train", settings=("train.num_workers=4", "train.batch_size=4"))
    assert not few.config.train.gpu
    assert few.lines == ("train: CPUs (2 x Tesla T4: too few for train.num_workers=4)",)


def test_the_answer_depends_on_precision_and_not_on_gpus():
    """Would catch labels made anew on another machine, or reused in another precision."""

    def key(choice: Choice) -> object:
        return choice.config.label.answer_settings()

    assert key(chosen()) == key(chosen(A100, settings=("label.teacher.dtype=float32",)))
    assert key(chosen()) != key(chosen(A100))


@pytest.mark.parametrize(
    ("gpus", "settings", "said"),
    [
        ((), (), ["label: CPUs (no GPU), float32"]),
        (
            (T4,),
            ("label.pool.max_size=2",),
            ["label: 1 GPU for each actor (2 x Tesla T4), float16"],
        ),
        ((UNUSED,), (), ["label: CPUs (2 x GPU idle: torch is a CPU build), float32"]),
        (
            (A100,),
            ("label.pool.max_size=3",),
            [
                "label: 1 GPU for each actor (8 x A100-SXM4-80GB), bfloat16",
                "note: 5 of 8 GPUs idle: label.pool.max_size=8 takes all",
            ],
        ),
        (
            (A100,),
            ("label.pool.num_gpus=0", "label.teacher.dtype=float32"),
            ["note: 8 of 8 GPUs idle: label.pool.num_gpus is 0"],
        ),
        ((), ("label.pool.num_gpus=0", "label.teacher.dtype=float32"), []),
    ],
)
def test_what_was_chosen_is_said_and_no_gpu_idles_unsaid(gpus, settings, said):
    """Would catch a run on the CPU of a machine with an idle GPU, without a word."""
    assert list(chosen(*gpus, settings=settings).lines) == said
    assert all(len(line) <= 80 for line in said)


def test_a_node_is_judged_by_torch_and_else_by_its_type():
    """Would catch a GPU of an old driver that is counted, or an unknown one taken for a new one."""
    seen = {"build": "13.0", "gpus": [["NVIDIA L4", 24 << 30, True], ["NVIDIA L4", 23 << 30, True]]}
    assert Gpus.of("L4", 2, 3, seen) == Gpus("L4", 2, 3, True, 23.0)
    assert Gpus.of("", 1, 1, {"build": None, "gpus": []}).trouble == "torch is a CPU build"
    assert Gpus.of("", 1, 1, {"build": "13.0", "gpus": []}).trouble == "torch for 13.0 sees none"
    assert [Gpus.of(kind, 1, 1, None).bfloat16 for kind in ("H100", "T4", "")] == [
        True,
        False,
        False,
    ]


def test_torch_answers_from_a_process_of_its_own():
    """Would catch a probe that does not run: every GPU would count as one of unknown kind."""
    seen = devices.torch_sees()
    assert seen is not None
    assert set(seen) == {"build", "gpus"}


def test_logical_gpus_of_a_cluster_are_looked_at_on_their_node(ray_session, monkeypatch):
    """Would catch a choice by the driver's own devices, and a probe that never gets to a node."""
    devices._on.cache_clear()

    def sees() -> object:  # pickled by value: it runs on the node
        import os

        return {"build": "13.0", "gpus": [[f"NVIDIA on {os.getpid()}", 16 << 30, True]] * 2}

    monkeypatch.setattr(devices, "torch_sees", sees)
    monkeypatch.setattr(devices, "local_gpus", lambda: 7.0)
    offer = cluster_offer(load_config(), "label")
    devices._on.cache_clear()
    assert offer.total == 2
    assert offer.usable[0].name.startswith("on ")
    assert offer.usable[0].name != f"on {__import__('os').getpid()}"


def test_nodes_that_are_not_up_yet(monkeypatch):
    """Would catch a cluster that scales from nothing being used as one of CPUs, or waited for."""
    asked = []

    def answer(function, seconds, node_id="", *, num_gpus=0.0):
        asked.append(num_gpus)
        return {"build": "13.0", "gpus": [["NVIDIA L4", 24 << 30, True]]}

    def offer(groups, *settings: str) -> Offer:
        asked.clear()
        monkeypatch.setattr(devices, "startable_gpus", lambda: groups)
        return cluster_offer(load_config(overrides=settings), "label")

    head = Cluster((Node("head", {"CPU": 8.0}),), autoscaling=True)
    monkeypatch.setattr(devices, "on_ray", lambda: True)
    monkeypatch.setattr(devices, "joined_cluster", lambda config: head)
    monkeypatch.setattr(devices, "_ask", answer)
    assert not offer([]).gpus  # nobody says that there can be any: the line says so
    assert not asked
    assert choose_devices(HtsConfig(), "label", Offer(autoscaling=True)).lines == (
        "label: CPUs (no node with a GPU is up), float32",
    )
    assert offer([], "label.pool.num_gpus=1").usable[0].bfloat16
    assert asked == [1.0]
    assert offer([("", 4.0, 2)]).usable[0].bfloat16
    assert asked == [1.0]
    kept = offer([("A100", 4.0, 2)], "label.teacher.dtype=bfloat16")
    assert (kept.total, asked) == (8.0, [])


def test_this_machine_is_the_node_of_a_local_cluster(monkeypatch):
    """Would catch CUDA_VISIBLE_DEVICES or ray.num_gpus=0 being passed over."""
    monkeypatch.setattr(devices, "on_ray", lambda: False)
    monkeypatch.setattr(devices, "local_gpus", lambda: 3.0)
    monkeypatch.setattr(devices, "_here", lambda: None)
    assert cluster_offer(load_config(), "label").total == 3
    none = HtsConfig(ray=RayConfig(num_gpus=0))
    assert not cluster_offer(none, "label").gpus
