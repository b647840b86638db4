"""What `hts` alone says of a run."""

from __future__ import annotations

import pytest

from hts_ray.cli.overview import find_runs, next_words, print_overview, steps_of
from hts_ray.store import storage
from hts_ray.store.run import StageFolder

TABLES = ["manifest", "region_scores", "pseudo_labels", "student", "predictions", "evaluation"]


def save_run(path, tables=(), finished_at=None, **stats):
    for name in ("config.yaml", "provenance.json"):
        storage.write_bytes(storage.join(str(path), name), b"{}")
    for table in tables:
        stage = StageFolder(str(path), table, "abc")
        stage.publish({"rows_out": 1200, **stats})
        if finished_at is not None:
            content = {**stage.stats, "finished_at": finished_at}
            storage.write_json(stage.file("stats.json"), content)
    return str(path)


@pytest.mark.parametrize(
    ("done", "command"),
    [
        (0, "hts prepare folder --root DIR --run-dir RUN"),
        (1, "hts label --run-dir RUN"),
        (2, "hts filter --run-dir RUN"),
        (3, "hts train --run-dir RUN"),
        (4, "hts predict --run-dir RUN"),
        (5, "hts report RUN"),  # nothing is annotated
        (6, "hts report RUN"),
    ],
)
def test_the_next_command_follows_what_is_there(done, command, tmp_path):
    """Catches advice to do again what is done, or to skip a stage."""
    run = save_run(tmp_path / "run", TABLES[:done])
    assert " ".join(next_words("RUN", steps_of(run))) == command


def test_annotated_images_are_evaluated_next(tmp_path):
    """Catches a run that could be evaluated and is sent to its report."""
    run = save_run(tmp_path / "run", TABLES[:5], annotated=3)
    assert next_words("RUN", steps_of(run))[1] == "evaluate"


def test_states_tell_rows_quarantine_and_interruptions(tmp_path, capsys):
    """Catches an interrupted stage that is called not begun, and counts that are left out."""
    run = save_run(tmp_path / "a [run]", TABLES[:1], quarantined=3, seconds=12.0)
    storage.write_json(f"{run}/region_scores-abc/table.json", {})
    storage.write_bytes(f"{run}/report.html", b"")
    print_overview(run)
    out = capsys.readouterr().out
    assert "a [run]" in out
    assert "1,200 rows, 3 quarantined, took 12 s" in out
    assert "begun, not finished" in out
    assert out.count("not yet") == 4
    assert "report.html" in out
    assert "next: hts label --run-dir '" in out


def test_the_latest_run_of_the_folder_is_shown(tmp_path, monkeypatch, capsys):
    """Catches `hts` that shows an empty default where runs lie beside it."""
    monkeypatch.chdir(tmp_path)
    assert find_runs() == []
    print_overview(None)
    assert "runs/default" in capsys.readouterr().out
    save_run(tmp_path / "runs" / "old", TABLES[:1], finished_at=1.0)
    save_run(tmp_path / "runs" / "demo" / "seed-0", TABLES[:2], finished_at=3.0)
    save_run(tmp_path / "runs" / "mine", TABLES[:3], finished_at=2.0)
    storage.write_bytes(str(tmp_path / "runs" / "notes" / "config.yaml"), b"")
    assert find_runs() == ["runs/old", "runs/mine", "runs/demo/seed-0"]
    print_overview(None)
    out = capsys.readouterr().out
    assert "run runs/demo/seed-0" in out
    assert "other runs here (--run-dir): runs/mine, runs/old" in out
    monkeypatch.chdir(tmp_path / "runs" / "mine")
    assert find_runs() == ["."]
