"""What a sweep tells while it runs."""

import io

import pytest
from rich.console import Console

from hts_ray.engine import console
from hts_ray.store.run import require_stage
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Trial, TrialLog
from hts_ray.sweep.plan import plan_sweep
from hts_ray.sweep.progress import describe, trials_progress

TRIALS = [
    Trial(OWN, {}, "complete", {}, (0.3, 0.4)),
    Trial(1, {}, "stopped", {}, (0.9,)),
    Trial(2, {}, "complete", {}, (0.5, 0.6)),
    Trial(3, {}, "infeasible", message="nothing is left"),
]


def test_the_best_is_a_complete_trial():
    """Would catch a best value that a stopped trial had after one lucky seed."""
    trials = {trial.number: trial for trial in TRIALS}
    assert describe(trials, "unseen_ap") == (
        "best unseen_ap 0.6000 (trial 2), own settings 0.4000, 1 infeasible, 1 stopped"
    )
    assert describe({OWN: TRIALS[0]}, "seen_ap") == "best seen_ap 0.4000 (own settings)"
    assert describe({}, "seen_ap") == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_terminals_get_a_bar_and_files_get_lines(with_sweep, swept_run, monkeypatch, terminal):
    """Would catch control characters in a log, and an ETA that counts what an earlier run paid."""
    plan = plan_sweep(
        with_sweep(sweep={"trials": 4}), require_stage(swept_run.run_dir, "region_scores", "label")
    )
    TrialLog(plan.stage.file(TRIALS_FOLDER)).write(TRIALS[0])
    sink = io.StringIO()
    target = Console(file=sink, force_terminal=terminal, force_interactive=terminal, width=200)
    monkeypatch.setattr(console, "console", target)
    with console.steps() as shown:
        show = trials_progress(plan, shown)
        for trial in TRIALS[1:]:
            show(trial)
    text = sink.getvalue()
    assert ("\x1b[" in text) == terminal
    assert "4/4" in text
    assert "0.6000 (trial 2)" in text
    if not terminal:
        (line,) = text.splitlines()  # the last trial; no more than one every 15 s
        assert line.startswith("sweep: 4/4 trials")
        assert "trials/s" not in line  # three at once are no rate, and the first was there before
