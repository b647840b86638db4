"""A command of `hts` as a job of a running cluster.

The client is Ray's own (its job API over HTTP, tokens included). This module adds:

- checks before anything is uploaded,
- an upload without data,
- a log that is followed through lost connections,
- the job's exit code.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import re
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from hts_ray.cluster.shipping import Shipped, check_size, files_to_ship, write_zip
from hts_ray.config import HtsConfig, RayConfig
from hts_ray.engine.compat import served_autoscaler_status
from hts_ray.engine.room import (
    Cluster,
    check_paths,
    check_room,
    demands,
    driver_paths,
    worker_paths,
)
from hts_ray.errors import ConfigError, UserError
from hts_ray.store import storage

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

MAX_UPLOAD_MIB = 64.0
# Exit codes of the client beside the job's own.
STOPPED = 3
DETACHED = 130  # as a shell counts an interrupt: how the job ends is not known
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_LOST_SECONDS = 300.0  # without an answer until the client gives up; the job goes on
_STOP_SECONDS = 60.0
_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 0.5, 10.0  # from one look at a job to the next
_LOG_PER_SECOND = 1e6  # characters of a log
_PATIENCE_SECONDS = 10.0  # that a job may take to start before the client says why it waits
_NAMED_ERROR = re.compile(r"[\w.]*(Error|Exception): ")
_NO_COMMAND = 127  # how a shell ends that finds no such program

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to run on a cluster: a command of `hts` with its arguments, and what it needs.

    `working_dir` is shipped and becomes the job's directory; `env` are environment variables of
    the driver and all workers; `requirements` are lines of a requirements file that `installer`
    (`uv` or `pip`) adds to the nodes' environment; `python` is the interpreter's name there.
    """

    arguments: tuple[str, ...]
    working_dir: Path = Path()
    env: Mapping[str, str] = field(default_factory=dict)
    requirements: tuple[str, ...] = ()
    installer: str = "uv"
    python: str = "python"
    max_upload_mib: float = MAX_UPLOAD_MIB
    submission_id: str | None = None

    @property
    def command(self) -> str:
        """The command of `hts` that the job runs."""
        return self.arguments[0]

    @property
    def entrypoint(self) -> str:
        """The shell command that the head node runs."""
        return shlex.join([self.python, "-m", "hts_ray.cli", *self.arguments])

    def runtime_env(self, package: Path) -> dict[str, Any]:
        """Ray's runtime environment of the job, with the zip to ship."""
        result: dict[str, Any] = {"working_dir": str(package), "env_vars": dict(self.env)}
        if self.requirements:
            result[self.installer] = list(self.requirements)
        return result


@dataclass(frozen=True)
class Plan:
    """A job that has passed the checks which need no cluster."""

    job: Job
    files: list[Shipped]
    upload_mib: float
    config: HtsConfig | None
    paths: list[tuple[str, str]]


def plan_job(
    job: Job, config: HtsConfig | None = None, paths: Iterable[tuple[str, str]] = ()
) -> Plan:
    """Check a job's upload and paths without a cluster.

    `config` are the settings of the job's command, None for a command without settings; `paths`
    are (option, path) of its other parameters. Raises ConfigError for an upload over the limit and
    for a relative path that the job would not find or whose results would be lost with it.
    """
    files = files_to_ship(job.working_dir)
    size = check_size(files, job.max_upload_mib)
    named = list(paths)
    if config is not None:
        named += [*worker_paths(config, job.command), *driver_paths(config, job.command)]
    names = {file.name for file in files}
    kept = [(name, path) for name, path in named if not _is_shipped(name, path, names)]
    return Plan(job, files, size, config, kept)


def _is_shipped(name: str, path: str, shipped: set[str]) -> bool:
    """Return whether a path travels with the job; ConfigError for a relative one that does not."""
    if storage.is_remote(path) or path.startswith("file://") or Path(path).is_absolute():
        return False
    inside = os.path.normpath(path)
    if inside in shipped or any(file.startswith(f"{inside}/") for file in shipped):
        return True
    raise ConfigError(
        "is relative and not among the files that are shipped: in a job it lies in a copy of the"
        " working directory that goes away with the job",
        field=name,
        value=path,
        remedy="write a URI, or an absolute path that the cluster's nodes see",
    )


def check_on(plan: Plan, cluster: Cluster) -> list[str]:
    """Check a planned job against a cluster; returns notes, raises ConfigError as the job would."""
    if plan.config is None:
        return []
    check_paths(cluster, plan.config.ray.shared_paths, plan.paths)
    return check_room(cluster, demands(plan.config, plan.job.command))


def connect(address: str | None = None) -> JobSubmissionClient:
    """Return a client of the cluster's job server.

    `address` is the dashboard's URL; without it RAY_API_SERVER_ADDRESS, RAY_ADDRESS and a cluster
    on this machine are tried. Raises UserError when nothing answers or the token is refused.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    target = address or next(filter(None, map(os.environ.get, _ADDRESS_VARIABLES)), "this machine")
    try:
        with _asking(address):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"the cluster at {target} refuses the token: export RAY_AUTH_MODE=token;"
            " RAY_AUTH_TOKEN, the file at RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token must hold the"
            " cluster's token"
        ) from error
    except (Exception, SystemExit) as error:  # Ray exits where it finds no cluster to ask
        raise UserError(
            f"no job server answers at {target} ({_one_line(error)}): give the dashboard's address,"
            " --address http://127.0.0.1:8265, and reach a remote one through a tunnel,"
            " `ssh -L 8265:127.0.0.1:8265 HEAD` or `kubectl port-forward`"
        ) from error


@contextmanager
def _asking(address: str | None) -> Iterator[None]:
    """Let a given address count before the environment's, and keep Ray's client from logging."""
    names = _ADDRESS_VARIABLES if address else ()
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    logger = logging.getLogger("ray")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
        os.environ.update(hidden)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _last_line(error: BaseException) -> str:
    """Return the line of a server's traceback that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if _NAMED_ERROR.match(line)]
    return (named or lines or [type(error).__name__])[-1][:500]


def open_token_note(client: JobSubmissionClient) -> str | None:
    """Return a warning when the token would cross a network unencrypted, None otherwise."""
    parts = urlsplit(client.get_address())
    if parts.scheme != "http" or os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    host = parts.hostname or ""
    with contextlib.suppress(OSError, ValueError):
        if ipaddress.ip_address(socket.gethostbyname(host)).is_loopback:
            return None
    return (
        f"the token goes to {host} unencrypted: prefer https, or a tunnel,"
        f" `ssh -L 8265:127.0.0.1:8265 {host}`"
    )


def cluster_behind(client: JobSubmissionClient, config: RayConfig) -> Cluster | None:
    """Return the cluster that a job server belongs to, None when it does not tell."""
    from ray.util.state import list_nodes

    address = client.get_address()
    try:
        with _asking(address):
            states = list_nodes(
                address, filters=[("state", "=", "ALIVE")], limit=10_000,
                raise_on_missing_output=False,
            )  # fmt: skip
        status = served_autoscaler_status(client)
    except Exception:  # the stage looks again when it starts
        return None
    rows = [
        {"host": node.node_ip, "resources": node.resources_total, "labels": node.labels}
        for node in states
    ]
    return Cluster.of_nodes(rows, config, json.dumps(status or {}))


def start(plan: Plan, client: JobSubmissionClient) -> str:
    """Upload what the job needs and start it; returns its id. Raises UserError when refused."""
    job = plan.job
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "working_dir.zip"
        write_zip(plan.files, package)
        try:
            return str(
                client.submit_job(
                    entrypoint=job.entrypoint,
                    runtime_env=job.runtime_env(package),
                    submission_id=job.submission_id,
                    metadata={"hts_command": job.command},
                )
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the cluster does not take the job: {_last_line(error)}") from error


def how_to_go_on(client: JobSubmissionClient, job_id: str) -> list[str]:
    """Return lines that say how to follow and to stop a job."""
    address = client.get_address()
    return [
        f"follow: hts submit --address {address} --attach {job_id}",
        f"stop:   ray job stop --address {address} {job_id}",
    ]


def wait(
    client: JobSubmissionClient, job_id: str, *, tell: Tell, ask: Callable[[], bool] | None = None
) -> int:
    """Follow a job's log until it ends, and return the exit code that stands for its end.

    0 for success, the job's own code for a failure (128 + n for signal n, 1 where Ray does not
    tell), STOPPED for a job that was stopped. On an interrupt `ask` says whether to stop the job;
    otherwise, and without `ask`, the client leaves it running and returns DETACHED. `tell` gets
    what the client itself has to say.
    """
    try:
        info = _follow(client, job_id, tell)
    except KeyboardInterrupt:
        return _interrupted(client, job_id, tell, ask)
    if info.status == "FAILED" and info.message and info.driver_exit_code is None:
        tell(info.message)  # it never ran, so that no log tells why
    code = exit_code(info)
    tell(f"job {job_id}: {str(info.status).lower()}" + (f", exit code {code}" if code else ""))
    if code == _NO_COMMAND:
        tell("start Ray on the head node in an activated environment, or name its --python")
    return code


def exit_code(info: JobDetails) -> int:
    """Return the exit code of the client for a job that has ended."""
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "STOPPED":
        return STOPPED
    code = info.driver_exit_code
    if not code:
        return 1
    return int(code) if code > 0 else 128 - int(code)


def _interrupted(
    client: JobSubmissionClient, job_id: str, tell: Tell, ask: Callable[[], bool] | None
) -> int:
    with contextlib.suppress(KeyboardInterrupt, click.Abort):
        if ask is not None and ask():
            client.stop_job(job_id)
            deadline = time.monotonic() + _STOP_SECONDS
            while time.monotonic() < deadline:
                info = client.get_job_info(job_id)
                if info.status.is_terminal():
                    tell(f"job {job_id}: {str(info.status).lower()}")
                    return exit_code(info)
                time.sleep(0.5)
            tell(f"job {job_id} was told to stop and is still {info.status}")
            return STOPPED
    tell(f"detached; job {job_id} goes on")
    for line in how_to_go_on(client, job_id):
        tell(line)
    return DETACHED


def _follow(client: JobSubmissionClient, job_id: str, tell: Tell) -> JobDetails:
    """Print a job's log until the job has ended, also over lost connections.

    The server sends the whole log each time, so a long one is asked for less often. Says why a job
    has not started yet, after a while and whenever the reason changes.
    """
    begun = answered = time.monotonic()
    written, told = 0, ""
    while True:
        asked = time.monotonic()
        try:
            info = client.get_job_info(job_id)  # before the log, which is then complete at the end
        except (OSError, RuntimeError) as error:
            if asked - answered > _LOST_SECONDS:
                hint = "; ".join(how_to_go_on(client, job_id))
                raise UserError(
                    f"the cluster has not answered for {_LOST_SECONDS:g} s"
                    f" ({_one_line(error)}); the job may be running: {hint}"
                ) from error
            time.sleep(2.0)
            continue
        log = ""
        with contextlib.suppress(OSError, RuntimeError):
            log = client.get_job_logs(job_id)
        sys.stdout.write(log[written:])
        sys.stdout.flush()
        written = max(written, len(log))
        if info.status.is_terminal():
            return info
        answered = time.monotonic()
        waits = info.status == "PENDING" and answered - begun > _PATIENCE_SECONDS
        if waits and info.message and info.message != told:
            told = info.message
            tell(f"waiting: {told}")
        time.sleep(min(max(_LOOK_SECONDS, written / _LOG_PER_SECOND), _LONGEST_LOOK_SECONDS))


def read_requirements(path: Path) -> tuple[str, ...]:
    """Return the lines of a requirements file; ConfigError when it is unreadable or names Ray."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(field="requirements", value=str(path), remedy=str(error)) from error
    kept = tuple(
        line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")
    )
    for line in kept:
        with contextlib.suppress(InvalidRequirement):
            if Requirement(line.partition(" #")[0]).name.lower() == "ray":
                raise ConfigError(
                    field="requirements",
                    value=line,
                    remedy="a job runs on the cluster's Ray: leave it out",
                )
    return kept


def parse_env(items: Sequence[str]) -> dict[str, str]:
    """Return variables given as KEY=VALUE, or as KEY alone for the value that it has here."""
    result = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals and key in os.environ:
            value = os.environ[key]
        elif not key or not equals:
            raise ConfigError(
                field="--env", value=item, remedy="write KEY=VALUE, or KEY of a variable set here"
            )
        result[key] = value
    return result
