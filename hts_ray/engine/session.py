"""How a driver joins or starts Ray."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hts_ray.config import HtsConfig, PoolConfig, RayConfig
from hts_ray.engine.compat import reread_variables
from hts_ray.engine.console import busy, print_note
from hts_ray.engine.room import CPUS_BESIDE, check_joined
from hts_ray.engine.telemetry import configured, on_ray
from hts_ray.errors import ConfigError, UserError
from hts_ray.images.manifest import Manifest

if TYPE_CHECKING:
    import pyarrow.dataset as pads

# The newer Parquet reader starts 32 actors that read footers, however small the input. A
# manifest is one file: the older reader saves these processes, and where the newer one is asked
# for, one of them is enough.
_DEFAULT_ENVIRONMENT = {
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    # On busy cores a node's agent takes longer than Ray's 30 s to report, and Ray gives up.
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    # Those of what Ray reads for itself, such as a checkpoint, go by no setting of a dataset's.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # Ray's C++ side calls every actor pool an error on the terminal, harmless as it is.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Ray runs workers at nice 15; here the driver computes too and would starve them.
    "RAY_worker_niceness": "0",
    # One machine is not preempted; the watcher would be one more process to start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
# What Ray's nodes print on a driver's terminal although nobody has to act on it: the traceback of
# an attempt that Ray repeats (a lasting failure ends the command with a line), and that a local
# cluster has many workers (its logical CPUs are more than the real ones).
_NOISE = (
    r"infinite retries remaining(?s:.*)Traceback \(most recent call last\)"
    r"|PYTHON worker processes have been started"
)
_LEVEL_NOTICE = b"Set ray log level from environment variable"


@contextmanager
def ray_cluster(config: RayConfig, pools: Sequence[PoolConfig] = ()) -> Iterator[None]:
    """Join the cluster of this job or address, else start a local one for the block's duration.

    A cluster that was running before is left running. A local cluster has no dashboard and, since
    Ray's own ports listen on every interface, asks for a token unless RAY_AUTH_MODE says
    otherwise; it gets logical CPUs for the actors of `pools` and for what works beside them.
    Raises UserError when no cluster can be reached or started, ConfigError for a local cluster
    whose CPUs the pools would take to the last, so that nothing could ever feed them.
    """
    for name, value in _DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    debug = bool(os.environ.get("HTS_DEBUG"))
    if not debug:
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _NOISE)  # read when Ray is imported
    if on_ray():
        with configured(config):
            yield
        return
    joins = bool(config.address or os.environ.get("RAY_ADDRESS"))
    if not joins:
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    import ray
    import ray.data  # sets its own log level when imported, so before the levels below

    reread_variables()  # a script may have imported Ray before
    where = (
        {"address": config.address}
        if joins
        else {
            "address": "local",
            "num_cpus": _local_cpus(config, pools),
            "num_gpus": config.num_gpus,
            "include_dashboard": False,
            "object_store_memory": config.object_store_gib and int(config.object_store_gib * 2**30),
        }
    )
    try:
        with contextlib.ExitStack() as around:
            # Joining, Ray may end the process within the call, and its words would be hidden.
            if not joins:
                around.enter_context(busy("starting Ray"))
                around.enter_context(_without_level_notice())
            ray.init(**where, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # of a node that is slow to start Ray raises no other class
        target = config.address or os.environ.get("RAY_ADDRESS") or "a local cluster"
        remedy = "check the address" if joins else "is the machine busy? run the same command again"
        raise UserError(f"Ray could not reach or start {target}: {error} ({remedy})") from error
    _protect_token()
    # A command reports its end in a line; Ray would print a traceback before that.
    level = logging.ERROR if debug else logging.CRITICAL
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    try:
        with configured(config):
            yield
    finally:
        ray.shutdown()


def joined(config: RayConfig) -> AbstractContextManager[None]:
    """Join the cluster that a command will run on, if it runs already; start none."""
    named = config.address or os.environ.get("RAY_ADDRESS")
    return ray_cluster(config) if named else contextlib.nullcontext()


@contextmanager
def command_cluster(
    config: HtsConfig,
    command: str,
    *,
    manifest: Manifest | None = None,
    paths: Sequence[tuple[str, str]] = (),
    labels: pads.Dataset | None = None,
) -> Iterator[None]:
    """Join or start Ray for a command of `hts`, and refuse a cluster that could never run it.

    Notes for the user are printed. Raises what `ray_cluster` and `check_joined` do.
    """
    pools = [config.label.pool, config.predict.pool]
    pools += [config.train.features.pool, config.score.pool]
    with ray_cluster(config.ray, pools):
        for note in check_joined(config, command, paths, manifest=manifest, labels=labels):
            print_note(note)
        yield


def _local_cpus(config: RayConfig, pools: Sequence[PoolConfig]) -> int:
    """Return the logical CPUs of a local cluster."""
    if config.num_cpus is None:
        wanted = max((math.ceil(pool.max_size * pool.actor_cpus) for pool in pools), default=0)
        return max(6, os.cpu_count() or 1, wanted + CPUS_BESIDE)
    taken = max((math.ceil(pool.min_size * pool.actor_cpus) for pool in pools), default=0)
    if pools and config.num_cpus < taken + CPUS_BESIDE:
        raise ConfigError(
            f"the actors of a pool take {taken}, reading, decoding and resuming {CPUS_BESIDE}",
            field="ray.num_cpus",
            value=config.num_cpus,
            remedy=f"set {taken + CPUS_BESIDE} or more (they are logical), or leave it out",
        )
    return config.num_cpus


@contextmanager
def _without_level_notice() -> Iterator[None]:
    """Hold standard error back, and give it out without Ray's notice of the log level set above.

    The notice comes from C++, so only the file descriptor can be held back.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, b"".join(line for line in held if _LEVEL_NOTICE not in line))


def _protect_token() -> None:
    """Take the token that Ray wrote for local clusters away from other users of the machine."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):
        token.chmod(0o600)
