"""Feed one data-parallel rank: its slice of every global batch, prepared ahead in threads."""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, islice

import numpy as np

from data.batch import Batch
from data.errors import DataError
from data.spec import changed_parts
from data.token_stream import TokenStream

MOST_SEQUENCES = 1 << 53
READ_AT_ONCE = 128


Step = tuple[int, list[Batch]]
"""Sequences of an optimizer step over all ranks, and this rank's micro-batches of it."""


class BatchSizes:
    """Sequences of every optimizer step: `ramp` lists (end, size) for the steps before `end`, then `final`.

    Raises:
        DataError: a size below 1, or ends that do not rise.
    """

    def __init__(self, final: int, ramp: Sequence[tuple[int, int]] = ()) -> None:
        ends = [0, *(end for end, _ in ramp)]
        if any(after <= before for before, after in zip(ends, ends[1:], strict=False)):
            raise DataError("batch_ramp: the steps must rise from 1 or more")
        if min([final, *(size for _, size in ramp)]) < 1:
            raise DataError("batch_ramp: a size is below 1")
        self.sizes = [*(size for _, size in ramp), final]
        self._first_steps = ends
        lengths = [end - first for first, end in zip(ends, ends[1:], strict=False)]
        counts = [length * size for length, size in zip(lengths, self.sizes, strict=False)]
        self._first_sequences = list(accumulate(counts, initial=0))

    def first_sequence(self, step: int) -> int:
        """Sequences of all steps before `step`."""
        part = bisect(self._first_steps, step) - 1
        return self._first_sequences[part] + (step - self._first_steps[part]) * self.sizes[part]

    def size_at(self, consumed: int) -> int:
        """Size of the step that follows `consumed` sequences."""
        return self.sizes[bisect(self._first_sequences, consumed) - 1]


class TrainLoader:
    """Endless optimizer steps: `next()` gives this rank's micro-batches of one step.

    A step that follows c sequences holds the sequences c, c + 1 ...; rank r takes the r-th of `dp_size` equal runs of
    them, in order. So the global batches are the same for every `dp_size`, micro-batch size and number of workers.

    Args:
        sizes: sequences of the optimizer steps over all ranks; an int when they do not change.
        micro_batch_size: sequences of one `Batch`.
        workers: threads that prepare steps; 0 prepares them when they are asked for.
        prefetch: steps prepared ahead; small ones are prepared together, so there may be more.
        pin_memory: put batches into page-locked memory, from which copies to a GPU overlap with its work.

    Raises:
        DataError: a setting out of range, or a size is not a multiple of `dp_size * micro_batch_size`.
    """

    def __init__(
        self,
        stream: TokenStream,
        sizes: BatchSizes | int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        workers: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._sizes = sizes if isinstance(sizes, BatchSizes) else BatchSizes(sizes)
        check_sizes(self._sizes, micro_batch_size, dp_rank, dp_size, workers, prefetch)
        self._stream = stream
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch = prefetch if workers else 0
        self._pin_memory = pin_memory
        self._consumed = 0
        self._ahead = 0
        self._ready: deque[Step] = deque()
        self._pending: deque[Future[list[Step]]] = deque()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="data-loader") if workers else None

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Micro-batches of the next step. An error of a thread is raised here; the step is not counted then."""
        if not self._ready:
            self._ready.extend(self._take())
        size, batches = self._ready.popleft()
        self._consumed += size
        return batches

    def state_dict(self) -> dict[str, int | str]:
        """Sequences returned so far over all ranks, and the fingerprint of their stream; at most 100 bytes of JSON."""
        return {"consumed": self._consumed, "fingerprint": self._stream.fingerprint}

    def load_state_dict(self, state: Mapping[str, object], accept_change: bool = False) -> None:
        """Continue after `state`; costs nothing, whatever the position. Batch and data-parallel size may differ.

        Raises:
            DataError: the state is malformed, or belongs to another stream and `accept_change` is not set.
        """
        self._consumed = checked_position(state, self._stream.fingerprint, accept_change)
        self._drop_pending()

    def close(self) -> None:
        """Stop the threads and wait for them; the loader is of no use afterwards."""
        self._drop_pending()
        if self._threads is not None:
            self._threads.shutdown(wait=True)

    def _take(self) -> list[Step]:
        try:
            while len(self._pending) <= self._prefetch:
                sizes = self._next_sizes()
                self._pending.append(self._start(self._ahead, sizes))
                self._ahead += sum(sizes)
            return self._pending.popleft().result()
        except BaseException:
            self._drop_pending()
            raise

    def _drop_pending(self) -> None:
        while self._pending:
            self._pending.pop().cancel()
        self._ready.clear()
        self._ahead = self._consumed

    def _next_sizes(self) -> list[int]:
        """Of the steps to prepare together: one, or several small ones."""
        sizes = [self._sizes.size_at(self._ahead)]
        while sum(sizes) + sizes[-1] <= READ_AT_ONCE * self._dp_size:
            sizes.append(self._sizes.size_at(self._ahead + sum(sizes)))
        return sizes

    def _start(self, consumed: int, sizes: list[int]) -> Future[list[Step]]:
        if self._threads is not None:
            return self._threads.submit(self._steps, consumed, sizes)
        done: Future[list[Step]] = Future()
        done.set_result(self._steps(consumed, sizes))
        return done

    def _steps(self, consumed: int, sizes: list[int]) -> list[Step]:
        """This rank's part of the steps that follow `consumed` sequences."""
        firsts = consumed + np.cumsum([0, *sizes[:-1]])
        shares = [size // self._dp_size for size in sizes]
        ranges = [np.arange(share) + first + self._dp_rank * share for first, share in zip(firsts, shares, strict=True)]
        batches = self._stream.batches(np.concatenate(ranges), self._micro_batch_size)
        if self._pin_memory:
            batches = [batch.pin_memory() for batch in batches]
        rest = iter(batches)
        return [
            (size, list(islice(rest, share // self._micro_batch_size)))
            for size, share in zip(sizes, shares, strict=True)
        ]


def check_sizes(
    sizes: BatchSizes, micro_batch_size: int, dp_rank: int, dp_size: int, workers: int, prefetch: int
) -> None:
    """Raise DataError naming what is out of range."""
    least = {"micro_batch_size": (micro_batch_size, 1), "dp_size": (dp_size, 1), "prefetch": (prefetch, 1)}
    for name, (value, lowest) in {**least, "workers": (workers, 0)}.items():
        if value < lowest:
            raise DataError(f"{name}: {value} is too small, {lowest} is the least")
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank: {dp_rank} is outside 0 .. {dp_size - 1}")
    for size in sizes.sizes:
        if size % (dp_size * micro_batch_size):
            raise DataError(
                f"global_batch_size: {size} is not a multiple of "
                f"data-parallel size {dp_size} x micro_batch_size {micro_batch_size}"
            )


def checked_position(state: Mapping[str, object], fingerprint: str, accept_change: bool) -> int:
    """`consumed` of a saved state. DataError when it is malformed or, unless accepted, of another stream."""
    consumed = state.get("consumed")
    if not isinstance(consumed, int) or isinstance(consumed, bool) or not 0 <= consumed < MOST_SEQUENCES:
        raise DataError(f"data state: `consumed` must be an integer in 0 .. 2^53 - 1, found {consumed!r:.40}")
    changed = changed_parts(state.get("fingerprint"), fingerprint)
    if changed and not accept_change:
        raise DataError(
            f"data state: {', '.join(changed)} changed since it was saved; "
            "set it back, or resume with data.accept_change=true"
        )
    return consumed
