"""Checkpoints of an unfinished training: what they restore and which they refuse."""

from __future__ import annotations

import json

import pytest
import torch

from hts_ray.config import OptimConfig, TrainConfig
from hts_ray.errors import ConfigError
from hts_ray.student.model import CosineClassifier
from hts_ray.student.optimizer import Optimizer
from hts_ray.student.resume import (
    KEPT_CHECKPOINTS,
    OPTIMIZER,
    STATE,
    Position,
    checkpoint_files,
    find_unlisted,
    newest_whole,
    read_files,
    restore,
    write_local,
)


def trained(seed, ema_decay=0.9):
    """Return the optimizer of a classifier, and of its average, after two steps."""
    torch.manual_seed(seed)
    config = TrainConfig(ema_decay=ema_decay, optim=OptimConfig(head_lr=0.1))
    optimizer = Optimizer.of(CosineClassifier(torch.randn(2, 3), 1.0), config)
    for _ in range(2):
        optimizer.model.logits(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


def test_everything_comes_back():
    """Catches weights and their average exchanged, a lost moment, count or place."""
    position = Position([{"loss": 0.5}], 3, 1.25, 12, 2.0, workers=2)
    first, second = trained(0), trained(1)
    files = checkpoint_files(first, None, position)
    assert restore(files, second, None, workers=2) == position
    for mine, theirs in ((first.model, second.model), (first.average, second.average)):
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    moments = [o.inner.state_dict()["state"][0]["exp_avg"] for o in (first, second)]
    assert torch.equal(*moments)
    assert not torch.equal(first.model.classifier, first.published.classifier)


def test_a_place_within_an_epoch_belongs_to_its_number_of_workers():
    """Catches images seen twice and others never when a run goes on with more workers."""
    optimizer = trained(0, ema_decay=None)
    inside = checkpoint_files(optimizer, None, Position(step=1, workers=2))
    with pytest.raises(ConfigError, match=r"train.num_workers = 4: .*go on with 2"):
        restore(inside, optimizer, None, workers=4)
    between = checkpoint_files(optimizer, None, Position(workers=2))
    assert restore(between, optimizer, None, workers=4).epoch == 0


def test_only_complete_checkpoints_count_and_old_ones_go(tmp_path):
    """Catches a checkpoint that was cut off being read, and a disk that fills up."""
    folder, optimizer = str(tmp_path), trained(0, ema_decay=None)
    assert newest_whole(folder) is None

    def write(step):
        write_local(folder, checkpoint_files(optimizer, None, Position(step=step)))

    def newest():
        return json.loads(read_files(newest_whole(folder))[STATE])["step"]

    for step in range(12):
        write(step)
    assert newest() == 11
    assert len(list(tmp_path.iterdir())) == KEPT_CHECKPOINTS
    (tmp_path / "checkpoint-000013").mkdir()
    (tmp_path / "checkpoint-000013" / "model.safetensors").write_bytes(b"half")
    assert newest() == 11
    write(12)
    assert newest() == 12


def test_a_list_of_checkpoints_that_was_cut_off_is_done_without(tmp_path):
    """Catches a full disk after which no training could be gone on with, or half a checkpoint."""
    optimizer = trained(0, ema_decay=None)
    files = {}
    for step in range(3):
        folder = tmp_path / f"checkpoint_2026-01-0{step + 1}"
        folder.mkdir()
        files[step] = checkpoint_files(optimizer, None, Position(step=step))
        for name, data in files[step].items():
            (folder / name).write_bytes(data[:-7] if (step, name) == (2, OPTIMIZER) else data)
    listing = tmp_path / "checkpoint_manager_snapshot.json"
    listing.write_text("{}")
    assert find_unlisted(str(tmp_path)) is None, "Ray Train knows them"
    listing.write_text("")
    found = find_unlisted(str(tmp_path))
    assert read_files(found) == files[1]
    assert not listing.exists()
    assert find_unlisted(str(tmp_path / "nothing")) is None
