"""What a sweep tells while it runs."""

import io

from rich.console import Console

from hts_ray.store.run import require_stage
from hts_ray.sweep.log import OWN, TRIALS_FOLDER, Trial, TrialLog
from hts_ray.sweep.plan import plan_sweep
from hts_ray.sweep.progress import SweepState, sweep_progress

TRIALS = [
    Trial(OWN, {}, "complete", {}, (0.3, 0.4)),
    Trial(1, {}, "stopped", {}, (0.9,)),
    Trial(2, {}, "complete", {}, (0.5, 0.6)),
    Trial(3, {}, "infeasible", message="nothing is left"),
]


def test_the_best_is_a_complete_trial():
    """Would catch a best value that a stopped trial had after one lucky seed."""
    state = SweepState(10, "calibrated_ap")
    for trial in TRIALS:
        state.add(trial)
    rows = dict(state.rows())
    assert rows["trials"] == "4/10 (2 complete, 1 infeasible, 1 stopped)"
    assert rows["best calibrated_ap"] == "0.6000 (trial 2)"
    assert rows["own settings"] == "0.4000"
    assert "ETA" in rows


def test_earlier_trials_do_not_speed_up_the_clock():
    """Would catch an ETA that counts trials which an earlier run paid for."""
    state = SweepState(10, "calibrated_ap", TRIALS)
    assert state.done == 4
    assert state.rate == 0
    assert "ETA" not in dict(state.rows())


def test_terminals_get_a_table_and_files_get_lines(with_sweep, swept_run):
    """Would catch control characters in a log, and a terminal that shows nothing."""
    plan = plan_sweep(
        with_sweep(sweep={"trials": 4}), require_stage(swept_run.run_dir, "region_scores", "label")
    )
    TrialLog(plan.stage.file(TRIALS_FOLDER)).write(TRIALS[0])
    for terminal in (True, False):
        sink = io.StringIO()
        target = Console(file=sink, force_terminal=terminal, width=200)
        with sweep_progress(plan, target) as show:
            for trial in TRIALS[1:]:
                show(trial)
        text = sink.getvalue()
        assert ("\x1b[" in text) == terminal
        assert "4/4" in text
        assert "0.6000 (trial 2)" in text
    lines = text.strip().splitlines()
    assert len(lines) == 1  # the last trial; no more than one every 15 s
