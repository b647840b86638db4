"""Tests of the log that keeps a deadly input from ending a run, or from never ending it."""

from __future__ import annotations

import os

import pytest

from hts_ray.engine.deaths import AttemptLog, each_in_a_process, survive
from hts_ray.errors import DataError


class WorkerDeathError(Exception):
    """Stands for the end of a process: whoever holds the log lives on."""


class Worker:
    """Dies of the ids in `deadly`; counts what it did."""

    def __init__(self, deadly):
        self.deadly = deadly
        self.done = []

    def __call__(self, ids, rows):
        """Do the rows of a batch."""
        for row in rows:
            if ids[row] in self.deadly:
                raise WorkerDeathError
            self.done.append(ids[row])
        return [ids[row].upper() for row in rows]


def run_until_done(log, ids, worker, max_attempts=2, restarts=20):
    """Restart a dying worker with the same batch, as Ray does."""
    for restart in range(restarts):
        try:
            results = survive(
                log, ids, lambda rows: worker(ids, rows), lambda row: "refused", max_attempts
            )
        except WorkerDeathError:
            continue
        return results, restart
    raise AssertionError("the batch never ended")


def test_deadly_rows_are_refused_and_no_others():
    """Catches a poison image that loops for ever, or that takes its batch along."""
    log, worker = AttemptLog(), Worker({"b", "d"})
    results, restarts = run_until_done(log, list("abcde"), worker)
    assert results == ["A", "refused", "C", "refused", "E"]
    assert restarts == 5  # the batch once, each of the two alone twice
    # The next batches know nothing of it.
    assert run_until_done(log, list("fgh"), worker) == (["F", "G", "H"], 0)


def test_a_worker_lost_by_chance_costs_no_image():
    """Catches a preempted node whose images are given up although nothing is wrong with them."""
    log = AttemptLog()
    for ids in (["a", "b"], ["c"]):
        assert log.begin(ids) is None  # signed in, then the node went away
    harmless = Worker(set())
    assert run_until_done(log, ["a", "b"], harmless)[0] == ["A", "B"]
    assert run_until_done(log, ["c"], harmless)[0] == ["C"]


def test_deaths_without_end_are_an_error():
    """Catches a broken node image that restarts workers, and pays for them, for ever."""
    log = AttemptLog(limit=4)
    with pytest.raises(DataError, match="4 workers died one after the other"):
        run_until_done(log, list("abcdefgh"), Worker(set("abcdefgh")))


def test_success_resets_the_count():
    """Catches a long run that is ended by deaths far apart."""
    log = AttemptLog(limit=3)
    for name in "abcdefgh":
        results, _ = run_until_done(log, [name, name * 2], Worker({name}), max_attempts=1)
        assert results == ["refused", name.upper() * 2]


def deadly(value):
    if value < 0:
        os._exit(11)
    return value * 2


def test_a_process_that_dies_costs_one_row():
    """Catches results that slip to another row when the process is started again."""
    results = each_in_a_process(deadly, [1, -1, -2, 3], lambda value: f"killed by {value}")
    assert results == [2, "killed by -1", "killed by -2", 6]
    assert each_in_a_process(deadly, [], str) == []
