"""Where the settings of trials come from: drawn by their number, or proposed by Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from hts_ray.config import SweepConfig
from hts_ray.errors import ConfigError
from hts_ray.sweep.log import OWN, Trial
from hts_ray.sweep.space import TRIES, Parameter, Settings, Space


class Proposer(Protocol):
    """A source of settings. Trial `OWN` always gets the run's own."""

    def propose(self, number: int) -> Settings:
        """Return the settings of a trial."""

    def tell(self, trial: Trial) -> None:
        """Learn from a trial that ended."""


def make_proposer(config: SweepConfig, space: Space, known: Sequence[Trial] = ()) -> Proposer:
    """Return the source of settings that `sweep.search` names; ConfigError without Optuna."""
    if config.search == "optuna":
        return OptunaProposer(space, config.seed, known)
    return RandomProposer(space, config.seed)


class RandomProposer:
    """Draws every trial's settings by its number."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def propose(self, number: int) -> Settings:
        """Return the settings of a trial."""
        return self._space.own() if number == OWN else self._space.draw(self._seed, number)

    def tell(self, trial: Trial) -> None:
        """Random draws learn nothing."""


class OptunaProposer:
    """Asks Optuna's TPE sampler, which learns from the trials that ended.

    `known` are trials of an earlier run. What was stopped or infeasible counts as pruned, which
    the sampler ranks behind what is complete.
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
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        # A sampler that goes on with its first seed would propose its first settings again.
        sampler = optuna.samplers.TPESampler(seed=seed + len(known), constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._distributions = {p.name: _distribution(p) for p in space.parameters}
        self._asked: dict[int, Any] = {}
        for trial in known:
            self.tell(trial)

    def propose(self, number: int) -> Settings:
        """Return the settings of a trial; those that contradict one another are told as pruned."""
        from optuna.trial import TrialState

        if number == OWN:
            return self._space.own()
        for _ in range(TRIES):
            asked = self._study.ask(self._distributions)
            settings = {
                p.name: asked.params[p.name] if p.choices is None
                else p.choices[asked.params[p.name]]
                for p in self._space.parameters
            }  # fmt: skip
            if self._space.problem(settings) is None:
                break
            self._study.tell(asked, state=TrialState.PRUNED)
        else:
            return settings
        self._asked[number] = asked
        return settings

    def tell(self, trial: Trial) -> None:
        """Tell Optuna how a trial ended; errors of ours say nothing about its settings."""
        from optuna.trial import TrialState, create_trial

        asked = self._asked.pop(trial.number, None)
        if trial.status == "complete":
            state, value = TrialState.COMPLETE, trial.objective
        else:
            state = TrialState.FAIL if trial.status == "failed" else TrialState.PRUNED
            value = None
        if asked is not None:
            self._study.tell(asked, value, state=state)
            return
        places = {p.name: _place(p, trial.settings[p.name]) for p in self._space.parameters}
        if all(place is not None for place in places.values()):
            self._study.add_trial(
                create_trial(
                    params=places, distributions=self._distributions, value=value, state=state
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


def _place(parameter: Parameter, value: Any) -> Any:
    """Return a value as Optuna knows it; None when it lies outside, as a run's own value may."""
    if parameter.choices is not None:
        return parameter.choices.index(value) if value in parameter.choices else None
    inside = value is not None and parameter.low <= value <= parameter.high
    return value if inside else None
