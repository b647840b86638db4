"""Which settings a sweep tries: checked against the typed configuration, drawn by seed and number.

Trial i's settings follow from the sweep's seed and i alone, so a sweep that was cut off goes on
with the settings that it would have had. No Ray here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from hts_ray.config import HtsConfig, RangeConfig, find_setting, override, walk_fields
from hts_ray.errors import ConfigError
from hts_ray.labels.evidence import COMPETING, LOG_LIKELIHOOD, read_info, read_regions
from hts_ray.labels.select import Aggregation

Settings = dict[str, Any]  # dotted name: value

SWEPT = ("filter.", "train.", "student.")  # what comes behind the teacher's pass
TRIES = 200  # draws until the settings of a trial fit together
_SAMPLE_IMAGES = 200  # whose scores tell where `null_score` may lie
_NULL_QUANTILES = (0.1, 0.3, 0.5, 0.7)
_MOST_REGIONS = 6
_CHANGED = 0.3  # of the run's settings, in every other trial
# Of `train`, what a fit of the classifier on stored features feels.
_FELT = re.compile(
    r"loss(_temperature)?|positive_weight|focal_\w+|asl_\w+|class_balance|epochs|batch_size"
    r"|min_positives_per_class|soft_labels|augment\.flip|optim\.(?!layer_decay)\w+"
)


@dataclass(frozen=True)
class Parameter:
    """One setting that is varied: `choices`, or numbers from `low` to `high`, both included."""

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    choices: tuple[Any, ...] | None = None

    def draw(self, rng: np.random.Generator) -> Any:
        """Return a value, evenly or, with `log`, evenly in its logarithm."""
        if self.choices is not None:
            return self.choices[int(rng.integers(len(self.choices)))]
        if self.integer and not self.log:
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.log:
            value = float(np.exp(rng.uniform(np.log(self.low), np.log(self.high))))
        else:
            value = float(rng.uniform(self.low, self.high))
        rounded = round(value) if self.integer else float(f"{value:.6g}")
        return min(max(rounded, self.low), self.high)

    def place_of(self, value: Any) -> Any:
        """Return a number itself, and a choice's place; None for what the parameter lacks."""
        if self.choices is not None:
            return self.choices.index(value) if value in self.choices else None
        return value if value is not None and self.low <= value <= self.high else None

    def value_at(self, place: Any) -> Any:
        """Return the value that `place_of` gives this place."""
        return place if self.choices is None else self.choices[place]

    def describe(self) -> str:
        """Return the range or the choices in words."""
        if self.choices is not None:
            return ", ".join(shown(value) for value in self.choices)
        return f"{self.low:g} to {self.high:g}{', log' if self.log else ''}"


def shown(value: Any) -> str:
    """Return a setting's value in words."""
    if isinstance(value, list | tuple):
        return "+".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class Space:
    """The parameters of a sweep around the settings of a run."""

    base: HtsConfig
    parameters: tuple[Parameter, ...]

    def own(self) -> Settings:
        """Return the run's own settings: what every trial is compared with."""
        return {
            p.name: plain(reduce(getattr, p.name.split("."), self.base)) for p in self.parameters
        }

    def draw(self, seed: int, trial: int) -> Settings:
        """Return the settings of a trial, the same for the same seed and number.

        In every other trial only some are drawn: of many settings of a run most are often right.
        What the run has outside of a parameter's range is never kept.
        Settings that contradict one another are drawn anew; after many tries the last are
        returned as they are, and `problem` tells what is wrong with them.
        """
        rng, own = np.random.default_rng([seed, trial]), self.own()
        share = 1.0 if trial % 2 else _CHANGED
        inside = {p.name for p in self.parameters if p.place_of(own[p.name]) is not None}
        settings: Settings = {}
        for _ in range(TRIES):
            settings = {
                p.name: own[p.name] if p.name in inside and rng.uniform() >= share else p.draw(rng)
                for p in self.parameters
            }
            if settings != own and self.problem(settings) is None:
                break
        return settings

    def problem(self, settings: Mapping[str, Any]) -> str | None:
        """Return what contradicts itself in the settings, or None."""
        try:
            trial_config(self.base, settings)
        except ConfigError as error:
            return str(error)
        return None

    def describe(self) -> list[tuple[str, str, str]]:
        """Return (setting, the run's own value, what is tried), for a plan."""
        own = self.own()
        return [(p.name, shown(own[p.name]), p.describe()) for p in self.parameters]

    def fingerprint(self) -> list[Any]:
        """Return what identifies the space, JSON-able."""
        return [
            [p.name, p.low, p.high, p.log, p.integer, plain(p.choices)] for p in self.parameters
        ]


def build_space(config: HtsConfig, region_scores: str) -> Space:
    """Return the space of `config.sweep.space`, or the default one for these region scores.

    Raises ConfigError, naming the setting and the nearest right name, for unknown settings, for
    settings that change no answer or that a trial cannot feel, and for values that the setting
    refuses; also when no draw fits together.
    """
    ranges = config.sweep.space
    if ranges is None:
        parameters = default_parameters(config, region_scores)
    else:
        parameters = [_parameter(name, given) for name, given in ranges.items()]
    if not parameters:
        raise ConfigError(field="sweep.space", value={}, remedy="name a setting, or leave it out")
    for parameter in parameters:
        # Of the rates a trial on features feels the classifier's alone.
        trunk = parameter.name == "train.optim.lr" and config.train.optim.head_lr is not None
        if config.sweep.train == "head" and (trunk or not feels(parameter.name)):
            raise _refusal(
                parameter.name,
                "trials fit the classifier on the student's stored features, which this setting"
                " does not change: set sweep.train=full",
            )
    space = Space(config, tuple(parameters))
    problem = space.problem(space.draw(config.sweep.seed, 1))
    if problem is not None:
        raise ConfigError(f"sweep.space: no settings drawn from it fit together, lastly: {problem}")
    return space


def trial_config(base: HtsConfig, settings: Mapping[str, Any]) -> HtsConfig:
    """Return the run's configuration with a trial's settings in place of its own.

    Raises ConfigError for unknown settings and values that do not fit.
    """
    return override(base, nested(settings))


def feels(name: str) -> bool:
    """Return whether a setting, by its dotted name, can change what a trial measures."""
    section, _, rest = name.partition(".")
    if name in ("filter.overrides", "filter.local_images", "filter.nodes"):
        return False  # what people decided is no setting, and where it is filtered no answer
    return section == "filter" or (section == "train" and _FELT.fullmatch(rest) is not None)


def default_parameters(config: HtsConfig, region_scores: str) -> list[Parameter]:
    """Return what is worth varying, given what the teacher stored."""
    info = read_info(region_scores)
    found = _Stored.of(region_scores)
    parameters = [
        Parameter("filter.positive_threshold", 0.2, 0.9),
        Parameter("filter.negative_threshold", 0.005, 0.3, log=True),
        Parameter("filter.per_class_quantile", choices=(None, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)),
        Parameter("filter.quantile_floor", 0.05, 0.5),
        Parameter("filter.aggregation", choices=get_args(Aggregation)),
        Parameter("filter.min_support", choices=(1, 2, 3)),
    ]
    if found.most_regions > 1:
        most = min(found.most_regions, _MOST_REGIONS)
        parameters.append(Parameter("filter.top_k", 1, most, integer=True))
    if info.get("score_kind", LOG_LIKELIHOOD) in COMPETING:
        if info.get("prior_log_likelihoods") is not None or config.filter.prior == "sample":
            parameters.append(Parameter("filter.prior_alpha", 0.0, 1.0))
        levels = {float(f"{v:.3g}") for v in np.quantile(found.best_scores, _NULL_QUANTILES)}
        if config.filter.null_score is not None:
            levels.add(config.filter.null_score)
        parameters.append(Parameter("filter.null_score", choices=(None, *sorted(levels))))
    if len(found.kinds) > 1:
        parameters.append(Parameter("filter.region_kinds", choices=subsets(found.kinds)))
    if len(found.margins) > 1:
        parameters.append(Parameter("filter.margins", choices=subsets(found.margins)))
    rate = config.train.optim.head_lr or config.train.optim.lr
    temperature = config.train.loss_temperature
    return [
        *parameters,
        Parameter("train.loss_temperature", temperature / 4, temperature * 4, log=True),
        Parameter("train.optim.head_lr", rate / 8, rate * 8, log=True),
    ]


@dataclass(frozen=True)
class _Stored:
    """What some of the stored regions look like."""

    kinds: tuple[str, ...]
    margins: tuple[float, ...]
    most_regions: int
    best_scores: np.ndarray  # each region's best log-likelihood

    @classmethod
    def of(cls, region_scores: str) -> _Stored:
        kinds, margins, best = set[str](), set[float](), [np.zeros(0, np.float32)]
        most = sampled = 0
        for regions in read_regions(region_scores):
            with_context_G = np.isin(regions.kinds_G, ("person", "union"))
            kinds.update(regions.kinds_G.tolist())
            margins.update(float(f"{m:.4g}") for m in np.unique(regions.margins_G[with_context_G]))
            most = max(most, int(np.diff(regions.offsets_N1).max()))
            more = min(len(regions.images), _SAMPLE_IMAGES - sampled)
            classes = len(regions.info["class_ids"])
            sample_GC = regions.scores_GS[: regions.offsets_N1[more], :classes]
            best.append(sample_GC.max(axis=1))
            sampled += more
        scores = np.concatenate(best)
        scores = scores[np.isfinite(scores)]
        if not len(scores):
            scores = np.zeros(1, np.float32)
        return cls(tuple(sorted(kinds)), tuple(sorted(margins)), most, scores)


def subsets(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return None for all, then all but one, then each alone, as lists without repeats."""
    found = [[value for value in values if value != left_out] for left_out in values]
    found += [[value] for value in values]
    unique = [entry for place, entry in enumerate(found) if entry not in found[:place]]
    return (None, *unique)


def _parameter(name: str, given: RangeConfig) -> Parameter:
    """Check a setting's name, and every value that is given for it."""
    info = field_of(name)
    declared: Any = Annotated[info.annotation, info]
    adapter: TypeAdapter[Any] = TypeAdapter(declared)
    numbers = {int, float}.intersection(get_args(info.annotation) or (info.annotation,))

    def checked(value: Any) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                field=f"sweep.space.{name}", value=value, remedy=str(error.errors()[0]["msg"])
            ) from None

    if given.choices is not None:
        return Parameter(name, choices=tuple(plain(checked(value)) for value in given.choices))
    if not numbers:
        raise ConfigError(
            field=f"sweep.space.{name}", remedy="it is not a number: give choices: [...]"
        )
    return Parameter(name, checked(given.low), checked(given.high), given.log, numbers == {int})


def field_of(name: str) -> FieldInfo:
    """Return the declaration of a dotted setting that can be swept.

    ConfigError for an unknown setting, with the nearest name; for one that says how a stage runs
    and not what it answers; and for one of another stage.
    """
    setting = find_setting(name)
    if setting is None or setting.section is not None:
        known = [found.name for found in walk_fields() if found.name.startswith(SWEPT)]
        last = name.rpartition(".")[2]
        same_end = [dotted for dotted in known if dotted.rpartition(".")[2] == last]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or same_end
        hint = f"; did you mean {close[0]}?" if close else f": known are {', '.join(known)}"
        raise _refusal(name, f"unknown setting{hint}")
    if setting.execution:
        raise _refusal(name, "it says how a stage runs, not what it answers")
    if not name.startswith(SWEPT):
        swept = ", ".join(f"{section}*" for section in SWEPT)
        raise _refusal(name, f"only {swept} can be swept; others need another teacher's pass")
    if name in ("train.labels", "train.split"):
        raise _refusal(name, "all trials learn from the pseudo-labels of one split")
    return setting.info


def _refusal(name: str, remedy: str) -> ConfigError:
    return ConfigError(field="sweep.space", value=name, remedy=remedy)


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested mappings, as `config.override` and YAML files have them."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        inner = result
        for part in sections:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return result


def plain(value: Any) -> Any:
    """Return tuples as lists: what JSON, YAML and Parquet give back."""
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
