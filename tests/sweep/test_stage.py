"""The sweep stage: what is refused, what comes out, and how other commands use it."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

from hts_ray import cli, stages
from hts_ray.config import load_config, parse_config
from hts_ray.engine.run import Run
from hts_ray.errors import ConfigError, DataError
from hts_ray.evaluate import label_matrix
from hts_ray.store import storage
from hts_ray.store.run import require_stage
from hts_ray.store.tables import read_table, write_table
from hts_ray.sweep import stage as sweep_stage
from hts_ray.sweep.estimate import estimate
from hts_ray.sweep.finalists import Finalist
from hts_ray.sweep.log import OWN, Trial
from hts_ray.sweep.objectives import DEFAULT_OBJECTIVE, HELD_OUT, VALIDATION
from hts_ray.sweep.plan import labeled_images, plan_sweep
from hts_ray.sweep.plots import sweep_section
from hts_ray.sweep.progress import print_sweep
from hts_ray.sweep.space import Space
from hts_ray.sweep.stage import (
    BEST_FILE,
    FINALISTS_FILE,
    TRIALS_FILE,
    best_overrides,
    choose_winner,
    find_sweep,
    require_results,
    run_sweep,
    seeds_error,
    trials_table,
)

TINY = {
    "trials": 5,
    "concurrency": 1,  # so that what a trial is compared with does not depend on the clock
    "finalists": 1,
    "repeats": 2,
    "space": {
        "filter.positive_threshold": {"low": 0.3, "high": 0.7},
        "filter.region_kinds": {"choices": [None, ["grid", "whole"]]},
        "filter.min_support": {"choices": [1, 2]},
        "train.optim.head_lr": {"low": 0.001, "high": 0.1, "log": True},
    },
}


def plan_of(run):
    return plan_sweep(run, require_stage(run.run_dir, "region_scores", "label"))


def annotated(run, count, split="test"):
    """Return the first rows of a split of the run's manifest."""
    table = run.manifest().table
    return table.filter(pc.equal(table["split"], split)).slice(0, count)


@pytest.fixture(scope="module")
def swept(swept_run, ray_session):
    """A finished label-free sweep, and what it told."""
    run = Run(parse_config({**swept_run.config.model_dump(), "sweep": TINY}), swept_run.class_table)
    plan = plan_of(run)
    told, lines = [], []
    return plan, run_sweep(plan, on_trial=told.append, tell=lines.append), told, lines


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sweep": {"objective": "blended"}}, "sweep.objective = 'blended'"),
        ({"sweep": {"objective": VALIDATION}}, "needs sweep.validation"),
        ({"train": {"labels": "annotations"}}, "train.labels=pseudo"),
        ({"sweep": {"space": {"filter.top": {"choices": [1]}}}}, "filter.top_k"),
        ({"sweep": {"train": "full"}}, "train.num_workers = 0"),
        ({"sweep": {"train": "full", "finalists": 0}, "train": {"num_workers": 1}}, "finalists"),
        ({"sweep": {"space": {"train.labels": {"choices": ["none"]}}}}, "pseudo-labels of one"),
    ],
)
def test_bad_plans_are_refused(with_sweep, settings, words):
    """Would catch a mistake that is found after the trials have run."""
    with pytest.raises(ConfigError, match=words):
        plan_of(with_sweep(**settings))


def test_every_input_names_another_folder(swept_run, with_sweep, tmp_path):
    """Would catch trials of other settings, labels or seeds taken for this sweep's."""
    manifest = str(tmp_path / "labeled.parquet")
    write_table(manifest, annotated(swept_run, 5))
    other = str(tmp_path / "other.parquet")
    write_table(other, annotated(swept_run, 6))
    changes = [
        {},
        {"sweep": {"seed": 1}},
        {"sweep": {"trials": 7}},
        {"sweep": TINY},
        {"filter": {"top_k": 1}},
        {"train": {"epochs": 2}},
        {"sweep": {"objective": "seen_ap"}},
        {"sweep": {"validation": manifest}},
        {"sweep": {"validation": other}},
    ]
    keys = [plan_of(with_sweep(**change)).stage.key for change in changes]
    assert len(set(keys)) == len(keys)
    same = plan_of(with_sweep(sweep={"concurrency": 3})).stage.key
    assert same == keys[0]


def test_a_sweep_publishes_trials_finalists_and_the_best(swept):
    """Would catch trials without their numbers, or a best that no finalist has."""
    plan, stage, told, lines = swept
    assert sorted(trial.number for trial in told) == list(range(5))
    table = read_table(stage.file(TRIALS_FILE))
    assert table["trial"].to_pylist() == list(range(5))
    assert table.schema.metadata[b"hts_table"] == b"trials"
    own = table.slice(0, 1).to_pylist()[0]
    assert own["status"] == "complete"
    for name, value in plan.space.own().items():
        assert own[name] == value
    for name in (DEFAULT_OBJECTIVE, "seen_ap", "positives_per_image"):
        assert own[name] > 0
    assert set(table["filter.min_support"].unique().to_pylist()) <= {1, 2}
    finalists = storage.read_json(stage.file(FINALISTS_FILE))
    assert finalists[0]["number"] == OWN
    assert len(finalists) == 2
    assert all(entry["objective"] == HELD_OUT for entry in finalists)
    assert all(0 < entry["value"] <= 1 for entry in finalists)
    values = {entry["number"]: entry["value"] for entry in finalists}
    best = stage.stats["best_trial"]
    assert best == OWN or values[best] == max(values.values())
    assert stage.stats["kept_own"] == (best == OWN)
    assert [entry["gain_error"] is None for entry in finalists] == [True, False]
    row = table.filter(pc.equal(table["trial"], best)).to_pylist()[0]
    best = load_config(overrides=best_overrides(stage))
    found = Space(best, plan.space.parameters).own()
    assert found == {name: row[name] for name in found}
    assert any("finalist" in line for line in lines)
    names = {path.rpartition("/")[2] for path in storage.list_names(stage.path)}
    assert names == {TRIALS_FILE, FINALISTS_FILE, BEST_FILE, "stats.json"}


def test_finalists_are_never_the_run_s_students(swept):
    """Would catch `hts predict` with a student of half the images."""
    plan, _, _, _ = swept
    overview = dict(stages.overview(plan.run.run_dir))
    assert overview["student"] is None
    assert overview["pseudo_labels"] is None


def test_a_finished_sweep_is_not_run_again(swept):
    """Would catch a second command that pays for everything again."""
    plan, stage, _, _ = swept
    before = stage.stats

    def refuse(_):
        raise AssertionError("a trial was run")

    assert run_sweep(plan, on_trial=refuse).stats == before
    assert find_sweep(plan.run.run_dir) == stage
    assert find_sweep(stage.path) == stage
    with pytest.raises(DataError, match="hts sweep"):
        find_sweep(plan.run.run_dir + "/none")


def test_the_report_shows_the_sweep(swept, capsys):
    """Would catch a section with settings or trials left out."""
    plan, stage, _, _ = swept
    html = sweep_section(plan.run.run_dir)
    assert stage.stats["verdict"] in html.unescape()
    assert html.count("<polyline") >= 5
    for name in plan.space.own():
        assert name in html
    assert sweep_section(plan.run.run_dir + "/none") == ""
    print_sweep(stage)
    assert "own settings" in capsys.readouterr().out


def test_labeled_images_choose_by_their_map(swept_run, with_sweep, tmp_path, ray_session):
    """Would catch labels that are not used, or images that students trained on."""
    manifest = str(tmp_path / "labeled.parquet")
    labeled = annotated(swept_run, 12, "train")
    write_table(manifest, pa.concat_tables([labeled, annotated(swept_run, 8)]))
    run = with_sweep(sweep={**TINY, "trials": 3, "repeats": 1, "validation": manifest})
    plan = plan_of(run)
    assert plan.objective == VALIDATION
    stage = run_sweep(plan)
    table = read_table(stage.file(TRIALS_FILE))
    assert table[VALIDATION].to_pylist() == pytest.approx(table["objective"].to_pylist())
    finalists = storage.read_json(stage.file(FINALISTS_FILE))
    assert [entry["objective"] for entry in finalists] == [VALIDATION] * 2
    assert 0 < finalists[0]["value"] < 1
    assert [entry["gain_error"] is None for entry in finalists] == [True, False]
    too_many = str(tmp_path / "all.parquet")
    write_table(too_many, annotated(swept_run, 60, "train"))
    with pytest.raises(ConfigError, match="not trained on labeled images"):
        plan_of(with_sweep(sweep={**TINY, "validation": too_many}))


def test_labels_without_a_positive_annotation_column_are_refused(swept_run, tmp_path):
    """Would catch an unlabeled manifest given as the labeled one."""
    table = annotated(swept_run, 5)
    place = table.column_names.index("positive_ids")
    empty = pa.nulls(len(table), table.schema.field(place).type)
    path = str(tmp_path / "bare.parquet")
    write_table(path, table.set_column(place, table.schema.field(place), empty))
    with pytest.raises(DataError, match="no annotated image"):
        labeled_images(swept_run, path)
    folder = swept_run.manifest().path.rpartition("/")[0]
    kept = labeled_images(swept_run, folder)
    assert kept.equals(labeled_images(swept_run, f"{folder}/manifest.parquet"))
    assert (label_matrix(kept, swept_run.class_table) == 1).any()


@pytest.mark.parametrize(("better", "winner"), [(0.6, 3), (0.5, OWN), (0.4, OWN), (None, OWN)])
def test_the_winner_has_to_beat_the_run_s_own_settings(better, winner):
    """Would catch settings that are no better taken for the best, and a failure that wins."""
    trials = {number: Trial(number, {}, "complete", {}, (0.1 * number,)) for number in (OWN, 3)}
    finalist = Finalist(OWN, {}, DEFAULT_OBJECTIVE, 0.0, 0.5, 1.0)
    others = replace(finalist, number=3, value=better, gain_error=0.01)
    found, verdict = choose_winner(DEFAULT_OBJECTIVE, trials, [finalist, others])
    assert found.number == winner
    assert ("own settings are kept" in verdict) == (winner == OWN)


@pytest.mark.parametrize("objective", [HELD_OUT, VALIDATION])
@pytest.mark.parametrize(("error", "winner"), [(0.01, 3), (0.09, OWN), (float("inf"), OWN)])
def test_a_gain_by_chance_wins_nothing(error, winner, objective):
    """Would catch settings chosen for a hundredth of AP, with labels or without."""
    trials = {number: Trial(number, {}, "complete", {}, (0.1 * number,)) for number in (OWN, 3)}
    own = Finalist(OWN, {}, objective, 0.0, 0.5, 1.0)
    other = replace(own, number=3, value=0.6, gain_error=error)
    found, verdict = choose_winner(DEFAULT_OBJECTIVE, trials, [own, other])
    assert found.number == winner
    assert ("chance" in verdict) == (winner == OWN)
    assert "standard error" in verdict


def test_without_finalists_the_trials_decide():
    """Would catch a stopped trial that is chosen for its first seed."""
    trials = {
        OWN: Trial(OWN, {}, "complete", {}, (0.2, 0.3)),
        1: Trial(1, {}, "stopped", {}, (0.9,)),
        2: Trial(2, {}, "complete", {}, (0.3, 0.4)),
    }
    assert choose_winner(DEFAULT_OBJECTIVE, trials, [])[0].number == 2
    trials[2] = replace(trials[2], reports=(0.8, 0.4))  # seeds of 0.8 and 0.0: chance
    kept, verdict = choose_winner(DEFAULT_OBJECTIVE, trials, [])
    assert kept.number == OWN
    assert "chance" in verdict
    assert seeds_error(trials[2], trials[OWN]) == pytest.approx(0.5)  # of 0.6 and -0.4
    trials[2] = replace(trials[2], reports=(0.4,))
    assert choose_winner(DEFAULT_OBJECTIVE, trials, [])[0].number == OWN  # one seed tells nothing


def test_own_settings_without_a_result_are_an_error():
    """Would catch a sweep that chooses although it has nothing to compare with."""
    trials = {OWN: Trial(OWN, {}, "infeasible", message="nothing is left")}
    with pytest.raises(DataError, match="nothing is left"):
        require_results(trials)


def test_values_of_several_types_are_told_as_json(swept):
    """Would catch a table that cannot be written for choices of mixed types."""
    plan, _, _, _ = swept
    values = [{"filter.null_score": None}, {"filter.null_score": -2.0}]
    space = replace(plan.space, parameters=())
    trials = [Trial(i, settings, "complete") for i, settings in enumerate(values)]
    assert len(trials_table(space, trials)) == 2
    assert sweep_stage._typed([1, "a", None]).to_pylist() == ["1", '"a"', None]
    assert sweep_stage._typed([["whole"], None]).to_pylist() == [["whole"], None]


def test_the_estimate_touches_nothing(swept, with_sweep):
    """Would catch a dry run that leaves folders behind, or promises nothing."""
    plan, _, _, _ = swept
    before = storage.list_names(plan.run.run_dir)
    figures = estimate(plan, sample=20)
    assert storage.list_names(plan.run.run_dir) == before
    assert figures["trials seconds"] > 0
    assert figures["finalists seconds"] > 0
    assert figures["features seconds"] == 0  # they are stored


def test_trials_that_train_in_full_are_estimated_as_trainings(with_sweep):
    """Would catch a dry run that measures features which such a sweep never computes."""
    space = {"train.optim.lr": {"low": 1e-5, "high": 1e-3, "log": True}}
    own = {"train": "full", "trials": 6, "finalists": 1, "concurrency": 2, "space": space}
    plan = plan_of(with_sweep(sweep=own, train={"num_workers": 1}))
    assert plan.objective == HELD_OUT
    figures = estimate(plan)
    assert figures["features seconds"] == 0
    assert figures["trials seconds"] == pytest.approx(3 * figures["trial seconds"])
    # One more half for each of both finalists: the first was trained by their trials.
    assert figures["finalists seconds"] == pytest.approx(2 * figures["trial seconds"])


def hts(*arguments, capsys):
    code = 0
    try:
        cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_other_commands_take_the_best(swept, capsys, tmp_path):
    """Would catch settings of a sweep that are not used, or win over the command line."""
    plan, stage, _, _ = swept
    run_dir = plan.run.run_dir
    (tmp_path / "c.yaml").write_text(plan.run.config.to_yaml())
    common = ["--config", str(tmp_path / "c.yaml"), "--run-dir", run_dir]
    best = yaml.safe_load(storage.read_bytes(stage.file(BEST_FILE)))
    code, out, err = hts(
        "train", *common, "--from-sweep", stage.path, "--print-config",
        "filter.min_support=7", capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    shown = yaml.safe_load(out)
    assert shown["filter"]["positive_threshold"] == best["filter"]["positive_threshold"]
    assert shown["train"]["optim"]["head_lr"] == best["train"]["optim"]["head_lr"]
    assert shown["filter"]["min_support"] == 7
    code, _, err = hts("filter", *common, "--from-sweep", str(tmp_path), capsys=capsys)
    assert code == 1
    assert "hts sweep" in err
    code, out, err = hts("train", *common, "--from-sweep", run_dir, "--dry-run", capsys=capsys)
    assert code == 0, err
    assert "pseudo_labels-" in out
    code, out, err = hts("train", *common, "--from-sweep", run_dir, capsys=capsys)
    assert code == 0, err
    overview = dict(stages.overview(run_dir))
    assert overview["pseudo_labels"] is not None
    assert overview["student"] is not None
    code, out, err = hts("sweep", *common, "sweep.space={filter.topk: {choices: [1]}}",
                         capsys=capsys)  # fmt: skip
    assert code == 2
    assert "did you mean filter.top_k?" in err
    code, out, err = hts("sweep", *common, "--dry-run", capsys=capsys)
    assert code == 0, err
    assert "filter.region_kinds" in out
    assert "trials seconds" in out
