"""Which images killed their worker: keeps one bad input from ending the run.

Ray restarts a dead worker and gives it the same batch again; an actor gets it for ever. So a worker
signs its batch in before the work and out afterwards. A batch that is signed in twice has killed a
worker, and its images are then tried one by one.

The log is a plain object; `start_log` keeps one in an actor of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from hts_ray.engine.telemetry import Meter
from hts_ray.errors import DataError

Row = TypeVar("Row")
Result = TypeVar("Result")

KILLED_WORKER = "killed_worker"


@dataclass
class Deaths:
    """How many workers died while they held an image: with others, and with it alone."""

    together: int = 0
    alone: int = 0


class AttemptLog:
    """The batches that workers have signed in to.

    After `limit` deaths in a row without a batch that succeeds, the run ends: it is not the images.
    """

    def __init__(self, limit: int = 30) -> None:
        self.limit = limit
        self._in_a_row = 0
        self._open: dict[str, bool] = {}
        self._deaths: dict[str, Deaths] = {}

    def begin(self, ids: Sequence[str], alone: bool = False) -> list[Deaths] | None:
        """Sign in to a batch, or return the deaths of its images if there was one.

        The worker of an image that is signed in already has died. The batch is then not signed
        in: its images are to be tried alone. Raises DataError after `limit` deaths in a row.
        """
        died = [image_id for image_id in ids if image_id in self._open]
        if died:
            self._in_a_row += 1
        for image_id in died:
            deaths = self._deaths.setdefault(image_id, Deaths())
            if self._open.pop(image_id):
                deaths.alone += 1
            else:
                deaths.together += 1
        if self._in_a_row >= self.limit:
            raise DataError(
                f"{self._in_a_row} workers died one after the other, the last over {died[:3]}:"
                " look for the cause in the workers' logs (memory, drivers), then run again"
            )
        known = [self._deaths.get(image_id, Deaths()) for image_id in ids]
        if not alone and any(deaths.together or deaths.alone for deaths in known):
            return known
        self._open.update((image_id, alone) for image_id in ids)
        return None

    def end(self, ids: Sequence[str]) -> None:
        """Sign out of a batch that was worked through."""
        self._in_a_row = 0
        for image_id in ids:
            self._open.pop(image_id, None)


class RemoteLog:
    """An AttemptLog in an actor; it forgets rather than fails when that actor is lost."""

    def __init__(self, handle: Any, meter: Meter) -> None:
        self.handle = handle
        self.meter = meter

    def begin(self, ids: Sequence[str], alone: bool = False) -> list[Deaths] | None:
        """See AttemptLog."""
        import ray

        try:
            answer: list[Deaths] | None = ray.get(self.handle.begin.remote(list(ids), alone))
        except ray.exceptions.RayActorError:
            return None
        if answer is not None:
            self.meter.count(retries=len(ids))
        return answer

    def end(self, ids: Sequence[str]) -> None:
        """See AttemptLog; nobody waits for the answer."""
        self.handle.end.remote(list(ids))


Log = AttemptLog | RemoteLog


def start_log(meter: Meter) -> RemoteLog:
    """Start the log of a run on the driver's node, beside whatever else runs there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(AttemptLog).options(num_cpus=0, scheduling_strategy=node)
    return RemoteLog(actor.remote(), meter)


def survive(
    log: Log,
    ids: Sequence[str],
    work: Callable[[list[int]], list[Result]],
    refuse: Callable[[int], Result],
    max_attempts: int,
) -> list[Result]:
    """Do `work` on the rows of a batch, row numbers in and one result a row out.

    After a death every row is worked on alone, and one that has killed `max_attempts` workers
    alone gets what `refuse` makes of it instead.
    """
    rows = list(range(len(ids)))
    deaths = log.begin(ids)
    if deaths is None:
        results = work(rows)
        log.end(ids)
        return results
    results = []
    for row in rows:
        if deaths[row].alone >= max_attempts:
            results.append(refuse(row))
            continue
        log.begin([ids[row]], alone=True)
        results += work([row])
        log.end([ids[row]])
    return results


def each_in_a_process(
    work: Callable[[Row], Result], rows: Sequence[Row], refuse: Callable[[Row], Result]
) -> list[Result]:
    """Do `work` on every row in another process; `refuse` gives the result of a row that kills it.

    `work` and the rows must pickle. Processes are spawned: a fork would copy the locks that the
    parent's threads hold.
    """
    context = multiprocessing.get_context("spawn")
    results: list[Result] = []
    waiting = list(rows)
    while waiting:
        with ProcessPoolExecutor(1, mp_context=context) as process, suppress(BrokenProcessPool):
            while waiting:
                results.append(process.submit(work, waiting[0]).result())
                waiting.pop(0)
        if waiting:  # the first of them killed the process
            results.append(refuse(waiting.pop(0)))
    return results
