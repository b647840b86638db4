"""Commands about clusters and machines: submit, doctor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from hts_ray.cli.app import cli
from hts_ray.cli.commands import MODULES
from hts_ray.cli.completers import PLACES, complete_job
from hts_ray.cli.options import (
    Settings,
    argument,
    option,
    refuse_options,
    split_settings,
    stage_command,
)
from hts_ray.cluster.doctor import examine, print_findings
from hts_ray.cluster.submit import (
    MAX_UPLOAD_MIB,
    Job,
    check_on,
    cluster_behind,
    connect,
    how_to_go_on,
    open_token_note,
    parse_env,
    plan_job,
    read_requirements,
    start,
    wait,
)
from hts_ray.config import HtsConfig, RayConfig, load_config
from hts_ray.engine.console import errors
from hts_ray.errors import ConfigError, DataError

_NOT_JOBS = {"submit", "completion"}


@click.command(context_settings={"allow_interspersed_args": False})
@option("--address", metavar="URL", help="Dashboard of the cluster (RAY_API_SERVER_ADDRESS).")
@option("--no-wait", is_flag=True, help="Return when the job has been submitted.")
@option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
@option("--env", multiple=True, metavar="KEY[=VALUE]", help="Variable of the job's workers.")
@option("--uv", metavar="FILE", help="requirements.txt that uv adds on the nodes.")
@option("--pip", metavar="FILE", help="requirements.txt that pip adds on the nodes.")
@option("--working-dir", default=".", metavar="DIR", help="What is shipped (default: here).")
@option("--max-upload", "max_upload_mib", type=float, default=MAX_UPLOAD_MIB, metavar="MIB",
        help=f"Refuse more (default {MAX_UPLOAD_MIB:g}).")  # fmt: skip
@option("--python", default="python", show_default=True, help="Interpreter on the head node.")
@option("--submission-id", metavar="ID", help="Name of the job, once a cluster.")
@argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...",
          shell_complete=complete_job)  # fmt: skip
def submit(
    arguments: tuple[str, ...],
    address: str | None,
    no_wait: bool,
    attach: str | None,
    env: tuple[str, ...],
    uv: str | None,
    pip: str | None,
    working_dir: str,
    **more: Any,
) -> None:
    """Run a command as a job of a cluster: hts submit -- label --run-dir s3://...

    The exit code is the job's own; 3 when it was stopped, 130 when this client detached from it.
    """
    if attach is not None:
        if arguments:
            refuse_options({"attach": attach}, "give it without a command")
        sys.exit(wait(connect(address), attach, tell=_say, ask=_asker()))
    if uv:
        refuse_options({"pip": pip}, "give --uv or --pip")
    config, paths = parse_command(arguments)
    file = uv or pip
    requirements = read_requirements(Path(file)) if file else ()
    job = Job(
        arguments, Path(working_dir), parse_env(env), requirements, "pip" if pip else "uv", **more
    )
    plan = plan_job(job, config, paths)
    client = connect(address)
    warning = open_token_note(client)
    if warning:
        _say(f"warning: {warning}")
    cluster = cluster_behind(client, config.ray if config else RayConfig())
    for note in check_on(plan, cluster) if cluster else []:
        _say(f"note: {note}")
    job_id = start(plan, client)
    where = f"{client.get_address()}" + (f" ({cluster})" if cluster else "")
    _say(f"job {job_id} on {where}; {len(plan.files)} files of {plan.upload_mib:.1f} MiB shipped")
    if not no_wait:
        sys.exit(wait(client, job_id, tell=_say, ask=_asker()))
    for line in how_to_go_on(client, job_id):
        _say(line)


def parse_command(arguments: tuple[str, ...]) -> tuple[HtsConfig | None, list[tuple[str, str]]]:
    """Parse the command of a job; returns its settings, if it has any, and (option, path) it names.

    Raises what the command itself would raise for wrong usage or settings.
    """
    name = arguments[0] if arguments else ""
    known = sorted(MODULES.keys() - _NOT_JOBS)
    if name not in known:
        remedy = f"name a command of hts behind --, one of {', '.join(known)}"
        raise ConfigError(field="command", value=name, remedy=remedy)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    params = dict(command.make_context(name, list(arguments[1:])).params)
    if name == "predict":  # it takes images between its settings
        params["overrides"], params["paths"] = split_settings(params["overrides"])
    config = _settings(params) if "overrides" in params else None
    if config is not None:
        del params["run_dir"]  # it is one of the settings
    named = [
        (parameter.opts[0], params[parameter.name])
        for parameter in command.params
        if parameter.metavar in PLACES and isinstance(params.get(parameter.name or ""), str)
    ]
    return config, [*named, *(("PATH", path) for path in params.get("paths", ()))]


def _settings(params: Mapping[str, Any]) -> HtsConfig:
    """Return the settings that the job will have, as far as they can be seen from here."""
    file, preset, run_dir = (params[name] for name in ("config_file", "preset", "run_dir"))
    try:
        return Settings(file, preset, run_dir, params["overrides"], dry_run=False).config
    except DataError:  # the run directory is on storage that only the cluster may open
        extra = {"run_dir": run_dir} if run_dir else {}
        return load_config(preset=preset, file=file, overrides=params["overrides"], extra=extra)


def _say(line: str) -> None:
    """Print what the client has to say beside the job's log, which has the standard output."""
    errors.print(line, markup=False, style="dim" if errors.is_terminal else None)


def _asker() -> Callable[[], bool] | None:
    """Return what asks whether to stop the job; None where nobody could answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask() -> bool:
        choice = click.prompt(
            "\nstop the job, or detach and leave it running?",
            type=click.Choice(["stop", "detach"]),
            default="detach",
            err=True,
        )
        return bool(choice == "stop")

    return ask


@click.command()
@option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@stage_command()
def doctor(settings: Settings, as_json: bool) -> None:
    """Check this machine, or all nodes of a cluster, and say what to change."""
    sys.exit(print_findings(examine(settings.config), as_json=as_json))
