"""Commands about clusters and machines: submit, doctor."""

from __future__ import annotations

import sys
from typing import Any

import click

from hts_ray.cli.app import cli
from hts_ray.cli.completion import complete_job
from hts_ray.cli.options import Settings, argument, option, stage_command


@cli.command(context_settings={"allow_interspersed_args": False})
@option("--address", metavar="URL", help="Dashboard of the cluster (RAY_API_SERVER_ADDRESS).")
@option("--no-wait", is_flag=True, help="Return when the job has been submitted.")
@option("--attach", metavar="JOB", help="Follow a job that was submitted before.")
@option("--env", multiple=True, metavar="KEY[=VALUE]", help="Variable of the job's workers.")
@option("--uv", metavar="FILE", help="requirements.txt that uv adds on the nodes.")
@option("--pip", metavar="FILE", help="requirements.txt that pip adds on the nodes.")
@option("--working-dir", default=".", metavar="DIR", help="What is shipped (default: here).")
@option("--max-upload", type=float, metavar="MIB", help="Refuse more (default 64).")
@option("--python", default="python", show_default=True, help="Interpreter on the head node.")
@option("--submission-id", metavar="ID", help="Name of the job, once a cluster.")
@argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...",
          shell_complete=complete_job)  # fmt: skip
def submit(arguments: tuple[str, ...], **options: Any) -> None:
    """Run a command as a job of a cluster: hts submit -- label --run-dir s3://...

    The exit code is the job's own; 3 when it was stopped, 130 when this client detached from it.
    """
    from hts_ray.cluster.submit import submit_command

    sys.exit(submit_command(arguments, **options))


@cli.command()
@option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@stage_command()
def doctor(settings: Settings, as_json: bool) -> None:
    """Check this machine, or all nodes of a cluster, and say what to change."""
    from hts_ray.cluster.doctor import examine, print_findings

    sys.exit(print_findings(examine(settings.config), as_json=as_json))
