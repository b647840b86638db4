"""How a configuration is put together: a preset, then a YAML file, then `a.b=value` overrides.

Unknown keys and wrong values are refused before anything runs.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hts_ray.config.fields import Section, Setting, walk_settings
from hts_ray.config.sections import HtsConfig
from hts_ray.errors import ConfigError
from hts_ray.store import storage

logger = logging.getLogger(__name__)
_PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Return the names of the packaged presets."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def load_config(
    *,
    preset: str | None = None,
    file: str | None = None,
    run_file: str | None = None,
    overrides: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> HtsConfig:
    """Build a configuration from a preset, YAML files and `a.b=value` overrides, in this order.

    `run_file` is what a run remembers, perhaps of another version: settings that there are no more
    are left out, and named. `extra` is a nested mapping applied last (command-line options such as
    --run-dir). Raises ConfigError naming field, value and remedy.
    """
    layers = [] if preset is None else [_read_preset(preset)]
    layers += [] if file is None else [_read_yaml(file)]
    if run_file is not None:
        known, others = of_this_version(_read_yaml(run_file))
        layers.append(known)
        if others:
            logger.warning(
                "%s: left out, as there is no such setting now: %s", run_file, ", ".join(others)
            )
    return parse_config(*layers, *map(_parse_override, overrides), extra or {})


def parse_config(*layers: Mapping[str, Any]) -> HtsConfig:
    """Merge nested values, the later ones over the earlier ones, and validate them.

    Raises ConfigError naming every wrong field, its value and the remedy.
    """
    values: dict[str, Any] = {}
    try:
        for layer in layers:
            _merge(values, layer)
        return HtsConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(item) for item in error.errors())) from None
    except RecursionError:
        raise ConfigError(
            "a section of the settings holds itself: write it without the YAML anchor, &name and"
            " *name, that leads back to it"
        ) from None


def override(config: HtsConfig, values: Mapping[str, Any]) -> HtsConfig:
    """Return the configuration with nested values changed and everything validated again."""
    return parse_config(config.model_dump(), values)


def of_this_version(
    values: Mapping[str, Any], section: type[Section] = HtsConfig, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Return nested values without those that are no settings, and the names of these."""
    fields, known, others = section.model_fields, {}, list[str]()
    for name, value in values.items():
        inner = fields[name].annotation if name in fields else None
        if name not in fields:
            others.append(f"{prefix}{name}")
        elif isinstance(inner, type) and issubclass(inner, Section) and isinstance(value, dict):
            known[name], more = of_this_version(value, inner, f"{prefix}{name}.")
            others += more
        else:
            known[name] = value
    return known, others


def _read_preset(name: str) -> dict[str, Any]:
    names = preset_names()
    if name not in names:
        raise ConfigError(
            field="--preset",
            value=name,
            remedy=f"choose one of {', '.join(names)}{_nearest_hint(name, names)}",
        )
    return _read_yaml(str(_PRESETS / f"{name}.yaml"))


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(storage.read_bytes(path).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(field="--config", value=path, remedy="no such file") from None
    # PyYAML raises ValueError for impossible dates, and RecursionError for deep nesting.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            field="--config", value=path, remedy=f"not readable as YAML: {error}"
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            field="--config",
            value=path,
            remedy="the file must hold `section:` keys, see --print-config",
        )
    return value


def _parse_override(override: str) -> dict[str, Any]:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(field="override", value=override, remedy="write it as section.name=value")
    try:
        value = yaml.safe_load(text) if text else None
    except (ValueError, RecursionError, yaml.YAMLError):
        value = text
    if isinstance(value, str):
        value = _number(value)
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _number(text: str) -> str | float:
    """Read what YAML 1.1 leaves as text, such as 1e-4, as the number that users mean."""
    try:
        return float(text)
    except ValueError:
        return text


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if not isinstance(value, Mapping):
            target[key] = value
            continue
        if not isinstance(target.get(key), dict):
            target[key] = {}
        _merge(target[key], value)


def _describe(item: Mapping[str, Any]) -> str:
    """Turn one of pydantic's findings into field, value and remedy."""
    location = [str(part) for part in item["loc"]]
    field = ".".join(location)
    if item["type"] == "extra_forbidden":
        sections = {found.name: found.section for found in walk_settings(HtsConfig)}
        section = {**sections, "": HtsConfig}.get(".".join(location[:-1]))
        names = list(section.model_fields) if section else []
        return f"{field}: unknown setting{_unknown_hint(location[-1], names)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] in {"missing", "model_type", "value_error"}:
        return f"{field}: {message}"
    return f"{field} = {item.get('input')!r}: {message}"


def _unknown_hint(key: str, names: Sequence[str]) -> str:
    """Return the nearest known name, of this section's `names` or of any other section."""
    elsewhere = [found.name for found in walk_fields() if found.name.split(".")[-1] == key]
    hint = _nearest_hint(key, names) or (f"; did you mean {elsewhere[0]}?" if elsewhere else "")
    return hint + (f" (known here: {', '.join(names)})" if names else "")


def _nearest_hint(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def find_setting(name: str) -> Setting | None:
    """Return the setting or section of a dotted name, None when there is none."""
    return next((found for found in walk_settings(HtsConfig) if found.name == name), None)


def walk_fields() -> Iterator[Setting]:
    """Yield every setting, without the sections."""
    return (found for found in walk_settings(HtsConfig) if found.section is None)
