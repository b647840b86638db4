"""What the commands of `hts` share: settings from options, and lines that several print."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from hts_ray.cli.completers import PLACES, Completer, complete_preset, complete_setting
from hts_ray.config import load_config, override
from hts_ray.engine.console import duration, percent, print_line, print_next, print_rows
from hts_ray.engine.run import CLASSES_FILE, CONFIG_FILE, Run, open_run
from hts_ray.engine.telemetry import log_as, run_tag
from hts_ray.errors import ConfigError
from hts_ray.store import storage

_COMMON = ("config_file", "preset", "run_dir", "dry_run")
_F = TypeVar("_F", bound=Callable[..., Any])


def option(*names: str, metavar: str | None = None, **settings: Any) -> Callable[[_F], _F]:
    """Declare an option; what its help calls DIR, FILE, PATH or RUN is completed as a path."""
    if metavar in PLACES:
        settings.setdefault("type", PLACES[metavar])
    return click.option(*names, metavar=metavar, **settings)


def argument(*names: str, metavar: str | None = None, **settings: Any) -> Callable[[_F], _F]:
    """Declare an argument, like `option`."""
    if metavar in PLACES:
        settings.setdefault("type", PLACES[metavar])
    return click.argument(*names, metavar=metavar, **settings)


class Settings:
    """The common options of every stage command, resolved.

    Without --config and --preset a run directory that has a `config.yaml` continues with it, and
    another one starts from the `default` preset.
    """

    def __init__(
        self,
        config_file: str | None,
        preset: str | None,
        run_dir: str | None,
        overrides: Sequence[str],
        dry_run: bool,
        default: str | None = None,
    ) -> None:
        self.dry_run = dry_run
        self._names_classes = any(entry.startswith("classes") for entry in overrides)
        self.remembered = None
        if config_file is None and preset is None and run_dir:
            path = storage.join(run_dir, CONFIG_FILE)
            self.remembered = path if storage.exists(path) else None
        self.config = load_config(
            preset=preset or (None if config_file else default),
            file=config_file,
            run_file=self.remembered,
            overrides=overrides,
            extra={"run_dir": run_dir} if run_dir else {},
        )

    def open(self) -> Run:
        """Load the classes; say so when the settings come from the run directory."""
        if self.remembered:
            print_line(f"settings: {self.remembered}")
        source, kept = self.config.classes.source, storage.join(self.config.run_dir, CLASSES_FILE)
        own = self._names_classes or source == "hico" or storage.exists(source)
        if self.remembered and not own and storage.exists(kept):  # it was named in another folder
            print_line(f"classes: {kept}, as there is no {source} here")
            self.config = override(self.config, {"classes": {"source": kept, "ids": None}})
        return open_run(self.config)


def stage_command(
    default_preset: str | None = None,
    *,
    from_sweep: bool = False,
    paths: str = "",
    complete: Completer = complete_setting,
    home: Callable[[Sequence[str]], str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that all stages share, and hand it their `Settings`.

    With `from_sweep` there is that option too; settings of the command line win over the sweep's.
    With `paths`, which is how its help calls them, the command also gets its arguments that are no
    settings. `home` makes the run directory of them where none is given.
    """
    shown = f"{paths} [section.name=value]...".strip()

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @option("--config", "config_file", metavar="FILE", help="YAML file of settings.")
        @option("--preset", metavar="NAME", help="Start from a packaged preset.",
                shell_complete=complete_preset)  # fmt: skip
        @option("--run-dir", metavar="DIR", help="Where the run lives.")
        @option("--print-config", is_flag=True, help="Print the resolved settings and stop.")
        @option("--dry-run", is_flag=True, help="Check everything, show the plan, and stop.")
        @argument("overrides", nargs=-1, metavar=shown, shell_complete=complete)
        @functools.wraps(function)
        def command(print_config: bool, overrides: tuple[str, ...], **options: Any) -> None:
            if paths:
                overrides, options["paths"] = split_settings(overrides)
            best = _sweep_overrides(options.get("from_sweep"))
            common = {name: options.pop(name) for name in _COMMON}
            if home is not None and common["run_dir"] is None:
                common["run_dir"] = home(options["paths"])
            settings = Settings(**common, overrides=[*best, *overrides], default=default_preset)
            if print_config:
                click.echo(settings.config.to_yaml(), nl=False)
                return
            stage = click.get_current_context().info_name or ""
            log_as(settings.config.ray.log_format, run_tag(settings.config.run_dir), stage)
            function(settings, **options)

        if not from_sweep:
            return command
        text = "Take the best settings of this sweep, or of a run's latest."
        return option("--from-sweep", metavar="DIR", help=text)(command)

    return decorate


def split_settings(arguments: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the settings, `section.name=value`, and the paths, which may hold a `=` too."""
    settings = tuple(
        entry
        for entry in arguments
        # A value may be an address; no scheme of one holds a `=`.
        if re.match(r"\w+(\.\w+)*=", entry) and ("://" in entry or not storage.exists(entry))
    )
    return settings, tuple(entry for entry in arguments if entry not in settings)


def _sweep_overrides(path: str | None) -> list[str]:
    if path is None:
        return []
    from hts_ray.sweep.stage import best_overrides, find_sweep  # torch loads slowly

    return best_overrides(find_sweep(path))


def refuse_options(given: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError for the first of some options, by name, that was given."""
    for name, value in given.items():
        if value not in (None, False):
            raise ConfigError(field=f"--{name.replace('_', '-')}", value=value, remedy=remedy)


def print_metrics(result: dict[str, Any]) -> None:
    """Print the mean average precisions of an evaluation."""
    rows = [
        [name, percent(result[name]), percent(result.get(f"{name}_known_object"))]
        for name in ("mAP", "few@1", "few@5", "few@10")
        if name in result
    ]
    title = f"{result['num_images']} images, {result['num_classes']} classes with a positive"
    print_rows(title, ["%", "default", "known object"], rows)


def readable(figures: dict[str, Any]) -> dict[str, str]:
    """Return figures of an estimate as a person reads them; those of seconds as times."""
    return {name: _figure(name, value) for name, value in figures.items()}


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, Mapping):
        return ", ".join(f"{part} {_figure(part, number)}" for part, number in value.items())
    if name.endswith("seconds"):
        return duration(float(value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_next_stage(command: str, run: Run, *more: str) -> None:
    """Print the command to run next on the same run, with further arguments."""
    target = run.config.run_dir
    where = [target] if command == "report" else ["--run-dir", target]
    print_next("hts", command, *where, *more)
