"""Where the settings of trials come from: drawn by their number, or proposed by Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hts_ray.config import SweepConfig
from hts_ray.errors import ConfigError
from hts_ray.sweep.log import OWN, Trial
from hts_ray.sweep.space import TRIES, Parameter, Settings, Space


def make_proposer(config: SweepConfig, space: Space, known: Sequence[Trial] = ()) -> Proposer:
    """Return the source of settings that `sweep.search` names; ConfigError without Optuna."""
    if config.search == "optuna":
        return OptunaProposer(space, config.seed, known)
    return Proposer(space, config.seed)


class Proposer:
    """Draws every trial's settings by its number; trial `OWN` has the run's own."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def propose(self, number: int) -> Settings:
        """Return the settings of a trial."""
        return self._space.own() if number == OWN else self._space.draw(self._seed, number)

    def tell(self, trial: Trial) -> None:
        """Take note of a trial that ended; random draws learn nothing from it."""


class OptunaProposer(Proposer):
    """Asks Optuna's TPE sampler, which learns from the trials that ended.

    `known` are trials of an earlier run. What was stopped or infeasible counts as pruned, which
    the sampler ranks behind what is complete: by how far it came, and then by its last report.
    """

    def __init__(self, space: Space, seed: int, known: Sequence[Trial] = ()) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                field="sweep.search",
                value="optuna",
                remedy="install it with `pip install hts-ray[optuna]`, or search at random",
            ) from None
        super().__init__(space, seed)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A sampler that goes on with its first seed would propose its first settings again.
        sampler = optuna.samplers.TPESampler(seed=seed + len(known), constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._distributions = {p.name: _distribution(p) for p in space.parameters}
        self._asked: dict[int, Any] = {}
        for trial in known:
            self.tell(trial)

    def propose(self, number: int) -> Settings:
        """Return the settings of a trial; contradictory ones count as pruned for Optuna."""
        from optuna.trial import TrialState

        if number == OWN:
            return self._space.own()
        for _ in range(TRIES):
            asked = self._study.ask(self._distributions)
            settings = {p.name: p.value_at(asked.params[p.name]) for p in self._space.parameters}
            if self._space.problem(settings) is None:
                break
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            return settings
        self._asked[number] = asked
        return settings

    def tell(self, trial: Trial) -> None:
        """Tell Optuna how a trial ended; an error of ours says nothing about its settings."""
        from optuna.trial import TrialState, create_trial

        asked = self._asked.pop(trial.number, None)
        if trial.status == "complete":
            state, value = TrialState.COMPLETE, trial.objective
        else:
            state = TrialState.FAIL if trial.status == "failed" else TrialState.PRUNED
            value = None
        steps = dict(enumerate(trial.reports, start=1))
        if asked is not None:
            for step, so_far in steps.items():
                asked.report(so_far, step)
            self._study.tell(asked, value, state=state)
            return
        places = {p.name: p.place_of(trial.settings[p.name]) for p in self._space.parameters}
        if all(place is not None for place in places.values()):
            self._study.add_trial(
                create_trial(
                    params=places,
                    distributions=self._distributions,
                    value=value,
                    state=state,
                    intermediate_values=steps,
                )
            )


def _distribution(parameter: Parameter) -> Any:
    from optuna import distributions

    if parameter.choices is not None:  # their places, for lists are no values of Optuna's
        return distributions.CategoricalDistribution(range(len(parameter.choices)))
    low, high, log = parameter.low, parameter.high, parameter.log
    if parameter.integer:
        return distributions.IntDistribution(int(low), int(high), log=log)
    return distributions.FloatDistribution(low, high, log=log)
