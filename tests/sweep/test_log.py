"""The log of trials: what is written is read, and nothing else."""

import pytest

from hts_ray.sweep.log import Trial, TrialLog, best_first, promising_first

TRIALS = [
    Trial(2, {"filter.region_kinds": ["whole"], "filter.null_score": None}, "complete",
          {"a": 0.5}, (0.25, 0.5), 1.5),
    Trial(0, {"filter.region_kinds": None}, "stopped", {"a": 0.7}, (0.7,)),
    Trial(11, {}, "infeasible", message="nothing is left"),
]  # fmt: skip


def test_trials_come_back_as_they_were(tmp_path):
    """Would catch values that JSON changes, and files of a write that was cut off."""
    log = TrialLog(str(tmp_path / "trials"))
    assert log.read() == {}
    for trial in TRIALS:
        log.write(trial)
    (tmp_path / "trials" / ".half.tmp").write_text('{"number": 5')
    assert list(log.read().items()) == [(0, TRIALS[1]), (2, TRIALS[0]), (11, TRIALS[2])]


def test_only_complete_trials_can_be_best():
    """Would catch a trial that is best for a lucky first seed."""
    better = Trial(9, {}, "complete", {}, (0.1, 0.5))
    found = best_first({trial.number: trial for trial in [*TRIALS, better]})
    assert found == [TRIALS[0], better]
    assert found[0].objective == pytest.approx(0.5)
    assert TRIALS[2].objective is None


def test_stopped_trials_come_after_the_complete_ones():
    """Would catch fewer finalists than asked for, where early stopping left too few trials."""
    further = Trial(5, {}, "stopped", {}, (0.3, 0.4))
    better = Trial(6, {}, "stopped", {}, (0.8,))
    trials = [*TRIALS, further, better]
    found = promising_first({trial.number: trial for trial in trials})
    assert found == [TRIALS[0], further, better, TRIALS[1]]
