"""A pure function over many blocks of a table, in this process or as tasks on Ray.

What a call makes can stay where it was made, for the next function to read: on Ray that is the
object store, which spills to disk. The driver gets what is small. Results come in the order of the
calls, so both ways give the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import starmap
from typing import Any

from hts_ray.config import HtsConfig, NodesConfig
from hts_ray.engine.console import busy, steps
from hts_ray.engine.mistakes import users_mistakes_unwrapped
from hts_ray.engine.ray_data import on_nodes
from hts_ray.engine.session import command_cluster
from hts_ray.engine.telemetry import on_ray

# Something that a call made: itself, or Ray's reference to it.
Kept = Any
_ANY = NodesConfig()
_AHEAD = 4  # calls that are submitted for every CPU


class Here:
    """Calls functions in this process, one after the other."""

    def map(
        self, function: Callable[..., Any], calls: Iterable[Sequence[Any]], *shared: Any
    ) -> Iterator[Any]:
        """Yield `function(*shared, *call)` of every call; a call's arguments may be `Kept`."""
        yield from starmap(partial(function, *shared), calls)

    def keep(
        self, function: Callable[..., tuple[Any, Any]], calls: Iterable[Sequence[Any]], *shared: Any
    ) -> Iterator[tuple[Kept, Any]]:
        """Do the same with a function that returns a pair, the first of it kept where it is."""
        yield from self.map(function, calls, *shared)


class OnRay(Here):
    """Calls functions as tasks, spread over the cluster; `shared` is sent once.

    Ray must be initialised when something is called. A call is made again when its worker dies or
    its storage fails: it must be able to. A user's mistake is raised as the worker raised it.
    `told` gets (done, total, "") of the calls whose results are kept.
    """

    def __init__(
        self,
        nodes: NodesConfig = _ANY,
        told: Callable[[int, int, str], None] = lambda *_: None,
    ) -> None:
        self._nodes, self._told = nodes, told

    def map(
        self, function: Callable[..., Any], calls: Iterable[Sequence[Any]], *shared: Any
    ) -> Iterator[Any]:
        """Yield what each call returns, in order, while later ones run."""
        for (done,) in self._submitted(function, calls, shared, 1):
            yield _result(done)

    def keep(
        self, function: Callable[..., tuple[Any, Any]], calls: Iterable[Sequence[Any]], *shared: Any
    ) -> Iterator[tuple[Kept, Any]]:
        """Yield a reference to the first of each pair, and the second."""
        calls = list(calls)
        for done, (kept, told) in enumerate(self._submitted(function, calls, shared, 2), 1):
            yield kept, _result(told)
            self._told(done, len(calls), "")

    def _submitted(
        self,
        function: Callable[..., Any],
        calls: Iterable[Sequence[Any]],
        shared: tuple[Any, ...],
        returns: int,
    ) -> Iterator[list[Any]]:
        import ray

        options = {"num_returns": returns, "scheduling_strategy": "SPREAD", **on_nodes(self._nodes)}
        task = ray.remote(_call).options(max_retries=3, retry_exceptions=[OSError], **options)
        sent = ray.put(shared)
        waiting: deque[list[Any]] = deque()
        for call in calls:
            made = task.remote(function, sent, *call)
            waiting.append([made] if returns == 1 else made)
            # Asked for anew each time: a cluster may grow.
            if len(waiting) >= _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1))):
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _result(reference: Any) -> Any:
    import ray

    with users_mistakes_unwrapped():
        return ray.get(reference)


def _call(function: Callable[..., Any], shared: tuple[Any, ...], *call: Any) -> Any:
    return function(*shared, *call)


@contextmanager
def blocks_of(config: HtsConfig, command: str, nodes: NodesConfig, *, many: bool) -> Iterator[Here]:
    """Give what calls functions: tasks on Ray's `nodes` for many blocks, this process for few.

    Ray is joined or started unless it runs already, as for a command of `hts`.
    """
    within = on_ray()  # a command's cluster, and its progress
    if not many:
        with nullcontext() if within else busy(command):
            yield Here()
        return
    if within:
        yield OnRay(nodes)
        return
    with command_cluster(config, command), steps() as shown:
        yield OnRay(nodes, shown.counts(command, "blocks"))
