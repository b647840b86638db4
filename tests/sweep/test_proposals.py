"""Where settings come from, and that Optuna goes on where it was."""

import sys

import pytest

from hts_ray.config import SweepConfig, load_config
from hts_ray.errors import ConfigError
from hts_ray.sweep.log import OWN, Trial
from hts_ray.sweep.proposals import OptunaProposer, Proposer, make_proposer
from hts_ray.sweep.space import Parameter, Space

SPACE = Space(
    load_config(overrides=["filter.positive_threshold=0.95", "filter.null_score=-2"]),
    (
        Parameter("filter.positive_threshold", 0.1, 0.9),
        Parameter("filter.negative_threshold", 0.05, 0.8, log=True),
        Parameter("filter.top_k", 1, 4, integer=True),
        Parameter("filter.region_kinds", choices=(None, ["whole"], ["grid", "whole"])),
    ),
)


def ended(number, settings, status="complete"):
    value = settings["filter.positive_threshold"]
    return Trial(number, settings, status, {}, (value,) if status != "infeasible" else ())


def test_random_settings_do_not_depend_on_what_ran_before():
    """Would catch a resumed sweep that tries other settings than an unbroken one."""
    first, second = Proposer(SPACE, 3), Proposer(SPACE, 3)
    first.propose(1)
    assert first.propose(7) == second.propose(7)
    assert first.propose(OWN) == SPACE.own()


def test_optuna_without_optuna_is_a_clear_error(monkeypatch):
    """Would catch an ImportError shown to users."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"hts-ray\[optuna\]"):
        make_proposer(SweepConfig(search="optuna"), SPACE)


def test_optuna_learns_and_goes_on():
    """Would catch a sampler that is told nothing, or that a second run starts from nothing."""
    pytest.importorskip("optuna")
    proposer = OptunaProposer(SPACE, seed=0)
    known = []
    for number in range(40):
        settings = proposer.propose(number)
        if number != OWN:
            assert SPACE.problem(settings) is None
        status = "infeasible" if number % 9 == 4 else "stopped" if number % 9 == 5 else "complete"
        known.append(ended(number, settings, status))
        proposer.tell(known[-1])
    thresholds = [trial.settings["filter.positive_threshold"] for trial in known[1:]]
    early, late = sum(thresholds[:10]) / 10, sum(thresholds[-10:]) / 10
    assert late > early + 0.1
    resumed = OptunaProposer(SPACE, seed=0, known=known)
    again = [resumed.propose(number)["filter.positive_threshold"] for number in range(40, 50)]
    assert sum(again) / 10 > early + 0.1
    assert all(value not in thresholds for value in again)
    curves = [dict(enumerate(trial.reports, start=1)) for trial in known[1:] if trial.reports]
    for study in (proposer._study, resumed._study):  # a stopped trial is ranked by how far it came
        told = [trial.intermediate_values for trial in study.trials if trial.intermediate_values]
        assert told == curves
