"""How the ranks that share a checkpoint folder agree, without any of them ever waiting for one that has failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sized
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from moe.checkpoint.manifest import CheckpointError

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class _Failure:
    reason: str


class Coordinator:
    """Collectives on CPU objects; in a single process (`group` None, nothing initialised) each is a plain call.

    Must be built by all ranks together: where the given group cannot move CPU tensors, a gloo group of the same ranks
    is made. All calls belong on the main thread, in the same order on every rank.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = _cpu_group(group)
        self.rank = dist.get_rank(self.group) if self.group else 0
        self.world_size = dist.get_world_size(self.group) if self.group else 1

    def all(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank."""
        if self.world_size == 1:
            return flag
        lowest = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=self.group)
        return bool(lowest.item())

    def exchange(self, local: Callable[[], T], decide: Callable[[list[T]], list[R]]) -> R:
        """Run `local` on every rank and `decide` on the first with all results; return this rank's reply.

        Raises:
            CheckpointError: on every rank, if `local` or `decide` failed on any.
        """
        results = self._gather(self._attempt(local))
        reply = self._scatter(self._replies(results, decide) if self.rank == 0 else None)
        if isinstance(reply, _Failure):
            raise CheckpointError(reply.reason)
        return reply

    def _attempt(self, action: Callable[[], T]) -> T | _Failure:
        try:
            return action()
        except Exception as error:
            logger.debug("checkpoint operation failed", exc_info=True)
            where = f"rank {self.rank}: " if self.world_size > 1 else ""
            return _Failure(where + describe(error))

    def _replies(self, results: list[T | _Failure], decide: Callable[[list[T]], list[R]]) -> list[R | _Failure]:
        failures = [result for result in results if isinstance(result, _Failure)]
        values = [result for result in results if not isinstance(result, _Failure)]
        replies = failures[0] if failures else self._attempt(lambda: decide(values))
        return [replies] * self.world_size if isinstance(replies, _Failure) else [*replies]

    def _gather(self, value: T) -> list[T]:
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.gather_object(value, values if self.rank == 0 else None, group=self.group, group_dst=0)
        return values

    def _scatter(self, values: list[T] | None) -> T:
        if self.world_size == 1 and values is not None:
            return values[0]
        received: list[T] = [None]  # type: ignore[list-item]
        dist.scatter_object_list(received, values, group=self.group, group_src=0)
        return received[0]


def nothing(results: Sized) -> list[None]:
    """The decision of an `exchange` that only has to find out whether all ranks succeeded."""
    return [None] * len(results)


def describe(error: BaseException) -> str:
    """One line that says what went wrong, with the file where the system named one."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    message = " ".join(str(error).split())
    return message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {message}"


def _cpu_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = group or dist.group.WORLD
    if "cpu" in dist.get_backend_config(group):
        return group
    return dist.new_group(dist.get_process_group_ranks(group), timeout=COLLECTIVE_TIMEOUT, backend="gloo")
