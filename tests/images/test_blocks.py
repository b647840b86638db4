"""A large `prepare`: the same manifest as a small one's, wherever it was cut off."""

from __future__ import annotations

import io
import os
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from hts_ray import stages
from hts_ray.config import PrepareConfig
from hts_ray.errors import DataError
from hts_ray.images import blocks
from hts_ray.images.manifest import open_manifest
from hts_ray.images.stage import PreparePlan, plan_prepare
from hts_ray.store import storage
from hts_ray.store.parts import ContentHash, PartWriter
from hts_ray.store.run import StageFolder
from hts_ray.store.tables import read_table

SMALL, LARGE = PrepareConfig(workers=2), PrepareConfig(workers=2, local_images=0)
ROWS = 11


@pytest.fixture
def two_blocks_a_list(monkeypatch):
    monkeypatch.setattr(blocks, "_BLOCKS_PER_LIST", 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images in a folder with a bad one, and the same in three tar shards with a cut one."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(ROWS):
        path = root / "loose" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + number, 30), (number, 0, 0)).save(path)
    (root / "loose" / "05.png").write_bytes(b"no image")
    (root / "tars").mkdir()
    for shard in range(3):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for number in range(shard, ROWS, 3):
                tar.add(root / "loose" / f"{number:02d}.png", f"{number:02d}.png")
        whole = data.getvalue() if shard < 2 else data.getvalue()[:1500]
        (root / "tars" / f"val-{shard}.tar").write_bytes(whole)
    return root


def plan(config: PrepareConfig, source: str, root: Path) -> PreparePlan:
    whole = plan_prepare(config, source, str(root))
    return replace(whole, found=replace(whole.found, block=min(3, whole.found.block)))


def everything(stage: StageFolder) -> dict[str, object]:
    manifest = open_manifest(stage.path)
    counts = stage.stats
    for name in ("finished_at", "duplicates"):
        counts.pop(name, None)
    return {
        "key": stage.key,
        "rows": manifest.table.to_pylist(),
        "stamps": manifest.stamps.to_pylist(),
        "quarantine": read_table(stage.file("quarantine")).to_pylist(),
        "counts": counts,
        "fingerprint": manifest.fingerprint,
    }


@pytest.mark.parametrize(("source", "folder"), [("folder", "loose"), ("webdataset", "tars")])
def test_a_large_prepare_gives_what_a_small_one_gives(
    tmp_path, photos, source, folder, two_blocks_a_list
):
    """Catches rows that are lost, moved or named otherwise at the edge of a block."""
    small = plan(SMALL, source, photos / folder)
    large = plan(LARGE, source, photos / folder)
    assert (small.large, large.large) == (False, True)
    told: list[tuple[int, int, int]] = []
    stage = large.write(str(tmp_path / "large"), lambda *counts: told.append(counts))
    assert everything(stage) == everything(small.write(str(tmp_path / "small")))
    assert told[-1][:2] == (len(large.found.listed),) * 2
    assert storage.list_names(str(tmp_path / "large")) == [f"manifest-{stage.key}"]


def test_a_prepare_that_was_cut_off_goes_on(tmp_path, photos, monkeypatch):
    """Catches blocks that are looked at twice, and a run that begins anew."""
    run, whole = str(tmp_path / "run"), plan(SMALL, "folder", photos / "loose")
    looked: list[int] = []

    def spread(work, numbers, fail_at=None):
        for (number,) in numbers:
            if number == fail_at:
                raise KeyboardInterrupt
            looked.append(number)
            yield work(number)

    def cut(work, numbers):
        return spread(work, numbers, fail_at=2)

    with pytest.raises(KeyboardInterrupt):
        plan(LARGE, "folder", photos / "loose").write(run, None, cut)
    assert not any(name.startswith("manifest-") for name in storage.list_names(run))
    # While the manifest's parts are written, too.
    monkeypatch.setattr(PartWriter, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plan(LARGE, "folder", photos / "loose").write(run, None, spread)
    monkeypatch.undo()
    # And before the manifest is published.
    monkeypatch.setattr(StageFolder, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plan(LARGE, "folder", photos / "loose").write(run, None, spread)
    monkeypatch.undo()
    stage = plan(LARGE, "folder", photos / "loose").write(run, None, spread)
    assert everything(stage) == everything(whole.write(str(tmp_path / "small")))
    assert looked == [0, 1, 2, 3]


def test_changed_images_are_looked_at_again(tmp_path, photos):
    """Catches blocks of a cut run that are taken for files which have changed since."""
    root, run = tmp_path / "in", str(tmp_path / "run")
    root.mkdir()
    (root / "a.png").write_bytes((photos / "loose" / "01.png").read_bytes())

    def look_and_stop(work, numbers):
        for (number,) in numbers:
            work(number)
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        plan(LARGE, "folder", root).write(run, None, look_and_stop)
    (root / "a.png").write_bytes((photos / "loose" / "09.png").read_bytes())
    stage = plan(LARGE, "folder", root).write(run)
    assert read_table(stage.path)["width"].to_pylist() == [29]


def test_a_shard_that_was_replaced_is_another_manifest(tmp_path, photos):
    """Catches labels that are kept for a shard whose images have the old ones' places."""
    root = tmp_path / "in"
    root.mkdir()
    data = (photos / "tars" / "val-0.tar").read_bytes()
    keys = set()
    for _ in range(2):
        (root / "0.tar").unlink(missing_ok=True)
        (root / "0.tar").write_bytes(data)
        stage = plan(SMALL, "webdataset", root).write(str(tmp_path / "run"))
        keys.add(open_manifest(stage.path).fingerprint)
    assert len(keys) == 2


def test_what_a_cut_prepare_left_goes_a_day_later(tmp_path, photos):
    """Catches blocks that stay for ever, and those of a prepare that runs removed."""
    run, day = tmp_path / "run", 24 * 3600
    for name, age in {"_prepare-old": 1.1 * day, "_prepare-running": 0.9 * day}.items():
        (run / name).mkdir(parents=True)
        (run / name / "0.parquet").touch()
        then = time.time() - age
        os.utime(run / name / "0.parquet", (then, then))
    stage = plan(SMALL, "folder", photos / "loose").write(str(run))
    assert storage.list_names(str(run)) == ["_prepare-running", f"manifest-{stage.key}"]


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_nothing_usable_is_told(tmp_path, config):
    """Catches an empty manifest that is published, and a refusal that does not say why."""
    (tmp_path / "a.png").write_bytes(b"no image")
    message = r"no usable image.*not_an_image 1; the first is .*a\.png: not "
    with pytest.raises(DataError, match=message):
        plan(config, "folder", tmp_path).write(str(tmp_path / "run"))
    assert not any("_prepare" in name for name in storage.list_names(str(tmp_path / "run")))


def test_a_manifest_of_part_files_is_read_as_one(tmp_path):
    """Catches rows lost at a file's end, and a fingerprint that depends on the layout."""
    columns = {"image_id": [f"{n}" for n in range(9)], "uri": list("abcdefghi")}
    table = pa.table({**columns, "split": ["x"] * 9})
    with PartWriter(str(tmp_path / "parts"), table.schema, size=1) as writer:
        for start in range(0, 9, 2):
            writer.write(table.slice(start, 2))
            writer._write_group()
            writer._finish_file()
            writer._start()
    assert len(storage.list_names(str(tmp_path / "parts"))) == 5
    with PartWriter(str(tmp_path / "one"), table.schema) as writer:
        writer.write(table)
    parts, one = (open_manifest(str(tmp_path / name)) for name in ("parts", "one"))
    assert parts.rows().to_pylist() == table.to_pylist()
    assert parts.fingerprint == one.fingerprint
    assert ContentHash(table).digest() == ContentHash(table.slice(0, 4), table.slice(4)).digest()


def test_a_large_prepare_on_ray(ray_session, tmp_path, photos):
    """Catches work that cannot be sent to workers, and results in the order of their arrival."""
    values = {"run_dir": str(tmp_path), "prepare": {"local_images": 0, "workers": 2}}
    stage = stages.prepare(stages.settings(**values), "webdataset", str(photos / "tars"))
    small = plan(SMALL, "webdataset", photos / "tars").write(str(tmp_path / "small"))
    assert everything(stage) == everything(small)
