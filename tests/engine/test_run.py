"""What a run records, and how a step of it is done once."""

import json

from hts_ray.classes import hico_classes
from hts_ray.config import parse_config
from hts_ray.engine.run import Run, Stage


def test_a_run_remembers_what_made_it_and_adds_to_it(tmp_path):
    """Would catch a second command that wipes what the first recorded."""
    table = hico_classes().subset(range(3))
    run = Run(parse_config({"run_dir": str(tmp_path / "run")}), table)
    run.record(images=7)
    run.record(teacher="blip")
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert (record["images"], record["teacher"], record["num_classes"]) == (7, "blip", 3)
    assert record["class_fingerprint"] == table.fingerprint()
    assert (tmp_path / "run" / "classes.csv").read_text().count("\n") == 4


def test_a_finished_stage_is_not_done_again(tmp_path):
    """Would catch a teacher pass that is paid for twice, and one that is never done."""
    run, calls = Run(parse_config({"run_dir": str(tmp_path)}), hico_classes()), []
    folder = run.stage("region_scores", "k")

    def work(progress):
        calls.append(progress)
        folder.publish({"rows_in": 1})

    stage = Stage(folder, {}, work)
    assert stage.run("shown") == folder
    assert stage.run("again") == folder
    assert calls == ["shown"]
