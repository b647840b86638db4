"""What bounds a training: the workers' own steps, decoding and reading, measured without Ray."""

from __future__ import annotations

import math
import time

import pytest

from hts_ray.config import TrainConfig
from hts_ray.student import measure
from hts_ray.student.feed import load_bytes
from hts_ray.student.measure import Pace, measure_pace, seconds_per_step


def test_the_steps_that_are_timed_are_the_workers_own(
    run_of, student_config, tmp_path, monkeypatch
):
    """Catches a dry run in float32, at the whole batch, without what saves memory."""
    config = TrainConfig(
        batch_size=8, num_workers=2, accumulation=2, gradient_checkpointing=True, ema_decay=0.9
    )
    student = student_config.model_copy(update={"precision": "bf16"})
    run, taken, take = run_of(tmp_path, train=config, student=student), [], measure.take_step

    def watched(stepper, batch):
        parts = []
        handle = stepper.model.register_forward_pre_hook(lambda _, given: parts.append(given[0]))
        told = take(stepper, batch)
        handle.remove()
        taken.append((stepper, batch, [len(part) for part in parts]))
        return told

    monkeypatch.setattr(measure, "take_step", watched)
    seconds, stored = seconds_per_step(run, "cpu")
    assert seconds > 0
    assert len(taken) == 3
    stepper, batch, parts = taken[-1]
    assert (stepper.accelerator.mixed_precision, parts) == ("bf16", [2, 2])
    assert stepper.student.visual.transformer.grad_checkpointing
    assert stepper.optimizer.averaged == 3
    assert batch["pixels"].shape == (4, stored, stored, 3)
    half = student_config.model_copy(update={"precision": "fp16"})
    assert seconds_per_step(run_of(tmp_path, train=config, student=half), "cpu")[0] > 0


@pytest.mark.parametrize(
    ("kept", "bound"),
    [("pixels", ("GPU", 90.0)), ("bytes", ("decoding", 40.0)), ("none", ("storage", 20.0))],
)
def test_what_bounds_an_epoch_depends_on_what_is_kept(kept, bound):
    """Catches decoding that is blamed although images are decoded once."""
    assert Pace(90.0, 40.0, 20.0, "cuda").bound(kept) == bound
    assert Pace(1.0, 40.0, 20.0, "cpu").bound(kept) == ("CPU", 1.0)


def test_reading_and_decoding_are_measured_on_the_images(
    run_of, color_world, tmp_path, monkeypatch
):
    """Catches waiting for storage that counts as decoding, workers' CPUs that decode, bad files."""
    monkeypatch.setattr(measure, "usable_cores", lambda: 6)
    monkeypatch.setattr(measure, "on_ray", lambda: False)

    def slow(table):
        time.sleep(0.5)
        return load_bytes(table)

    monkeypatch.setattr(measure, "load_bytes", slow)
    uris = [*color_world["uri"].to_pylist()[:10], "/nowhere.png"]
    run = run_of(tmp_path, train=TrainConfig(num_workers=2, batch_size=2))
    pace = measure_pace(run, uris, 64, 5.0, "cpu")
    assert pace.reading < 10 * 4 / 0.5
    assert pace.decoding > pace.reading
    one = run_of(tmp_path, train=TrainConfig(num_workers=2, batch_size=2, decode_tasks=1))
    assert measure_pace(one, uris, 64, 5.0, "cpu").reading < 10 * 2 / 0.5
    nothing = measure_pace(run, ["/nowhere.png"], 64, 5.0, "cpu")
    assert (nothing.reading, nothing.decoding) == (math.inf, math.inf)
