"""What `make gpu` runs, at tiny sizes on a CPU."""

from __future__ import annotations

import json
import sys

import gpu
import pytest
import torch


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Let every import of Ray fail: the first parts do without."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "ray", None)


def test_training_is_compared_with_bare_steps():
    """Would catch steps that are not the workers', and FLOPs that are counted for a whole batch."""
    figures = gpu.training(gpu.TINY)
    assert figures["precision"] == "bf16"
    assert figures["share_of_bare"] > 0.05
    assert 0 < figures["augmentation_share"] < 1
    assert figures["images_per_second"] * figures["gflop_an_image"] / 1e3 == pytest.approx(
        figures["tflop_per_second"]
    )
    # Two blocks of width 64 over 17 tokens: 2 FLOPs a weight and token, three times as many in all.
    weights = 2 * 12 * 64 * 64 + 3 * 16 * 16 * 64
    assert 0.8 < figures["gflop_an_image"] * 1e9 / (3 * 2 * weights * 17) < 1.4


@pytest.mark.parametrize("family", ["blip", "git", "chat"])
def test_a_teacher_of_each_kind_is_checked_and_timed(family):
    """Would catch a model that is not in half precision, or ways that score differently."""
    figures = gpu.teacher(family, gpu.TINY)
    assert set(figures["self_check"]) == {"float16", "bfloat16"}
    assert all(check["ok"] for check in figures["self_check"].values())
    assert figures["trie_batched_nats"] < 0.5
    assert figures["regions"] == 14 * (1 if family == "chat" else 2)
    assert min(figures["seconds_by_call"].values()) > 0


def test_memory_that_runs_out_halves_the_regions():
    """Would catch figures of a run in which memory never ran out, or scores that it changed."""
    figures = gpu.halving(gpu.TINY)
    assert (figures["chunk_before"], figures["chunk_after"]) == (28, 3)
    assert figures["largest_difference_nats"] < 0.05


def test_a_part_that_fails_or_hangs_leaves_the_others_their_time(tmp_path, monkeypatch, capsys):
    """Would catch one crash of CUDA, or one hang, that takes all figures along."""
    hangs = gpu.in_a_process([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert hangs == {"error": "not done after 0 s"}
    dies = gpu.in_a_process([sys.executable, "-c", "raise SystemExit(7)"], 30)
    assert dies == {"error": "its process ended with 7"}

    def breaks(sizes):
        raise RuntimeError("CUDA error")

    parts = {"bad": (breaks, 60.0), "good": (lambda sizes: {"x": 1}, 60.0)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: bad; the others' figures are written"):
        gpu.main()
    written = json.loads(out.read_text())
    assert written["parts"]["bad"]["error"] == "RuntimeError: CUDA error"
    assert written["parts"]["good"]["figures"] == {"x": 1}
    late = gpu.run_parts(["good"], 0.0, lambda name, left: {"figures": {}})
    assert late == {"good": {"seconds": 0.0, "error": "no time was left"}}
    capsys.readouterr()


def test_without_a_gpu_nothing_is_published(monkeypatch, capsys):
    """Would catch figures of a CPU under the name of a GPU's."""
    for more in ([], ["--tiny"], ["--only", "nothing", "--out", "x"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *more])
        with pytest.raises(SystemExit):
            gpu.main()
    told = capsys.readouterr().err
    assert "say with --out where JSON may go" in told
    assert "--only nothing: give some of training, blip" in told


@pytest.mark.gpu
def test_steps_on_a_gpu_wait_for_nothing_and_augment_as_on_a_cpu():
    """Catches an operation that makes the host wait, and a kernel that differs from the CPU's."""
    own = gpu.OwnSteps(gpu.TINY, 4, compiled=False)
    own.take(3)
    assert own.waits(3) == 0
    config, size = own.config.augment, gpu.TINY.student
    batches = (own.host, own.moved())
    here, there = (gpu.augment(b["pixels"], b["augmentation"], size, config) for b in batches)
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-4)
