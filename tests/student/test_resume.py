"""Checkpoints of an unfinished training: what they restore and which they refuse."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel

from hts_ray.errors import ConfigError
from hts_ray.student.resume import (
    KEPT_CHECKPOINTS,
    OPTIMIZER,
    STATE,
    Position,
    checkpoint_files,
    find_unlisted,
    read_local,
    read_stored,
    restore,
    write_local,
)


def owners(seed):
    """Return a model, its average and its optimizer after a step."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    average = AveragedModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    return model, average, optimizer


def test_everything_comes_back():
    """Catches weights and their average exchanged, a lost moment, count or place."""
    accelerator = Accelerator(cpu=True)
    position = Position([{"loss": 0.5}], 3, 1.25, 12, 2.0, workers=2)
    first, second = owners(0), owners(1)
    files = checkpoint_files(*first, accelerator, position)
    assert restore(files, *second, accelerator, workers=2) == position
    for mine, theirs in zip(first[:2], second[:2], strict=True):
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    moments = [o.state_dict()["state"][0]["exp_avg"] for o in (first[2], second[2])]
    assert torch.equal(*moments)
    assert not torch.equal(first[0].weight, first[1].module.weight)


def test_a_place_within_an_epoch_belongs_to_its_number_of_workers():
    """Catches images seen twice and others never when a run goes on with more workers."""
    accelerator = Accelerator(cpu=True)
    model, _, optimizer = owners(0)
    inside = checkpoint_files(model, None, optimizer, accelerator, Position(step=1, workers=2))
    with pytest.raises(ConfigError, match=r"train.num_workers = 4: .*go on with 2"):
        restore(inside, model, None, optimizer, accelerator, workers=4)
    between = checkpoint_files(model, None, optimizer, accelerator, Position(workers=2))
    assert restore(between, model, None, optimizer, accelerator, workers=4).epoch == 0


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path):
    """Catches a checkpoint that was cut off being read, and a disk that fills up."""
    folder = str(tmp_path)
    assert read_local(folder) is None
    for number in range(12):
        write_local(
            folder, {"model.safetensors": b"m", "optimizer.pt": b"o", STATE: b"%d" % number}
        )
    assert read_local(folder)[STATE] == b"11"
    assert len(list(tmp_path.iterdir())) == KEPT_CHECKPOINTS
    (tmp_path / "checkpoint-000013").mkdir()
    (tmp_path / "checkpoint-000013" / "model.safetensors").write_bytes(b"half")
    assert read_local(folder)[STATE] == b"11"
    write_local(folder, {"model.safetensors": b"m", "optimizer.pt": b"o", STATE: b"12"})
    assert read_local(folder)[STATE] == b"12"


def test_a_list_of_checkpoints_that_was_cut_off_is_done_without(tmp_path):
    """Catches a full disk after which no training could be gone on with, or half a checkpoint."""
    model, _, optimizer = owners(0)
    files = {}
    for step in range(3):
        folder = tmp_path / f"checkpoint_2026-01-0{step + 1}"
        folder.mkdir()
        position = Position(step=step)
        files[step] = checkpoint_files(model, None, optimizer, Accelerator(cpu=True), position)
        for name, data in files[step].items():
            (folder / name).write_bytes(data[:-7] if (step, name) == (2, OPTIMIZER) else data)
    listing = tmp_path / "checkpoint_manager_snapshot.json"
    listing.write_text("{}")
    assert find_unlisted(str(tmp_path)) is None, "Ray Train knows them"
    listing.write_text("")
    found = find_unlisted(str(tmp_path))
    assert read_stored(found) == files[1]
    assert not listing.exists()
    assert find_unlisted(str(tmp_path / "nothing")) is None
