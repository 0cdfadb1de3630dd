"""Feed one data-parallel rank: its slice of every global batch, prepared ahead in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data.batch import Batch
from data.errors import DataError
from data.spec import changed_parts
from data.token_stream import TokenStream

MOST_SEQUENCES = 1 << 53


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
        self._first_sequences = [int(count) for count in np.cumsum([0, *counts])]

    def first_sequence(self, step: int) -> int:
        """Sequences of all steps before `step`."""
        part = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return self._first_sequences[part] + (step - self._first_steps[part]) * self.sizes[part]

    def size_at(self, consumed: int) -> int:
        """Size of the step that follows `consumed` sequences."""
        return self.sizes[int(np.searchsorted(self._first_sequences, consumed, side="right")) - 1]


class TrainLoader:
    """Endless optimizer steps: `next()` gives this rank's micro-batches of one step.

    A step that follows c sequences holds the sequences c, c + 1 ...; rank r takes the r-th of `dp_size` equal runs of
    them, in order. So the global batches are the same for every `dp_size`, micro-batch size and number of workers.

    Args:
        sizes: sequences of the optimizer steps over all ranks; an int when they do not change.
        micro_batch_size: sequences of one `Batch`.
        workers: threads that prepare steps; 0 prepares them when they are asked for.
        prefetch: steps prepared ahead.
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
        self._pending: deque[tuple[int, Future[list[Batch]]]] = deque()
        self._threads = ThreadPoolExecutor(max_workers=max(workers, 1), thread_name_prefix="data-loader")

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Micro-batches of the next step. An error of a thread is raised here; the step is not counted then."""
        while len(self._pending) <= self._prefetch:
            size = self._sizes.size_at(self._ahead)
            self._pending.append((size, self._threads.submit(self._step, self._ahead, size)))
            self._ahead += size
        size, batches = self._pending.popleft()
        try:
            result = batches.result()
        except BaseException:
            self._drop_pending()
            raise
        self._consumed += size
        return result

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
        self._threads.shutdown(wait=True)

    def _drop_pending(self) -> None:
        while self._pending:
            self._pending.pop()[1].cancel()
        self._ahead = self._consumed

    def _step(self, consumed: int, size: int) -> list[Batch]:
        share = size // self._dp_size
        first = consumed + self._dp_rank * share
        starts = range(first, first + share, self._micro_batch_size)
        batches = [self._stream.batch(np.arange(start, start + self._micro_batch_size)) for start in starts]
        return [batch.pin_memory() for batch in batches] if self._pin_memory else batches


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
