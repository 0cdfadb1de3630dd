"""Feed one data-parallel rank from virtual streams: its sequences of every global batch, prepared ahead."""

from __future__ import annotations

import atexit
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from math import gcd
from queue import Empty, Full, Queue
from typing import Any, Protocol

import numpy as np

from data.batch import Batch, Sequences
from data.errors import DataError
from data.loader import BatchSizes, check_sizes, checked_position
from data.text.cursor import FIELDS, pack_cursors, unpack_cursors
from data.text.deal import Turn
from data.text.reader import BadRow
from data.text.stream import TextStream
from data.text.workers import POLL_SECONDS, LocalTurns, Stopped, WorkerTurns

MOST_REPORTED = 20
Step = tuple[int, list[Batch], np.ndarray]
"""Size over all ranks, this rank's micro-batches, and the cursors they moved."""


class TextLoader:
    """Endless optimizer steps: `next()` gives this rank's micro-batches of one step.

    A step that follows c sequences holds the sequences c, c + 1 ...; rank r takes those of the r-th of `dp_size` equal
    runs of streams, in order. So the global batches, put back in order, are the same for every `dp_size`, micro-batch
    size and number of workers.

    Args:
        sizes: sequences of the optimizer steps over all ranks; an int when they do not change.
        micro_batch_size: sequences of one `Batch`.
        workers: processes that read and tokenise; 0 for a thread of this process.
        prefetch: steps prepared ahead.
        pin_memory: put batches into page-locked memory, from which copies to a GPU overlap with its work.
        report: told about the first bad rows, one line each, from another thread.

    Attributes:
        bad_rows: rows by source that could not be read, counted each time they are come upon.

    Raises:
        DataError: a setting out of range, or sizes, streams and `dp_size` that do not divide each other.
    """

    def __init__(
        self,
        stream: TextStream,
        sizes: BatchSizes | int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        workers: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        report: Callable[[str], object] | None = None,
    ) -> None:
        self._sizes = sizes if isinstance(sizes, BatchSizes) else BatchSizes(sizes)
        check_sizes(self._sizes, micro_batch_size, dp_rank, dp_size, workers, prefetch)
        num_streams = stream.corpus.streams
        _check_streams(self._sizes, dp_size, num_streams)
        self._stream = stream
        self._micro_batch_size, self._prefetch, self._pin_memory = micro_batch_size, prefetch, pin_memory
        own = num_streams // dp_size
        self._own = range(dp_rank * own, (dp_rank + 1) * own)
        self._workers = min(workers, own)
        self._report = report
        self.bad_rows: Counter[str] = Counter()
        self._consumed = 0
        self._cursors = np.zeros((own, len(stream.text.sources), FIELDS), dtype=np.int64)
        self._ahead: _Ahead | None = None

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Micro-batches of the next step. An error of a thread or process is raised here; the step is not counted."""
        if self._ahead is None:
            self._ahead = _Ahead(self._turns(), self._step, self._consumed, self._prefetch)
        try:
            size, batches, moves = self._ahead.next_step()
        except BaseException:
            self.close()
            raise
        self._consumed += size
        for place, source, *cursor in moves.tolist():
            self._cursors[place, source] = cursor
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Sequences returned so far over all ranks, fingerprint, and where this rank's streams stand.

        JSON, about 7 bytes for every stream and source. `merge_states` makes one state of those of all ranks.
        """
        return {
            "consumed": self._consumed,
            "fingerprint": self._stream.fingerprint,
            "first_stream": self._own.start,
            "streams": len(self._own),
            "sources": list(self._stream.text.sources),
            "cursors": pack_cursors(self._cursors),
        }

    def load_state_dict(self, state: Mapping[str, Any], accept_change: bool = False) -> None:
        """Continue after `state`, that of all streams; the data-parallel size may differ.

        Of a text that has changed, if accepted, every source goes on at the place where it stood; a new one begins.

        Raises:
            DataError: the state is malformed, or belongs to another stream and `accept_change` is not set.
        """
        streams = self._stream.corpus.streams
        if (state.get("first_stream"), state.get("streams")) != (0, streams):
            found = f"streams from {state.get('first_stream')} on, {state.get('streams')} of them"
            raise DataError(f"data state: has {found}; data.streams={streams} needs all of as many")
        consumed = checked_position(state, self._stream.fingerprint, accept_change)
        if consumed % streams:
            raise DataError(f"data state: `consumed` {consumed} is not a multiple of data.streams={streams}")
        saved = state.get("sources")
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            raise DataError(f"data state: `sources` must be a list of names, found {saved!r:.80}")
        cursors = unpack_cursors(state.get("cursors"), streams, len(saved))
        self.close()
        self._consumed = consumed
        self._cursors[:] = 0
        for place, name in enumerate(self._stream.text.sources):
            if name in saved:
                self._cursors[:, place] = cursors[self._own.start : self._own.stop, saved.index(name)]

    def close(self) -> None:
        """End the thread and the processes and wait for them; `next()` would start them again."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _turns(self) -> LocalTurns | WorkerTurns:
        stream, turn = self._stream, self._consumed // self._stream.corpus.streams
        settings = (stream.corpus, stream.spec, self._own, self._cursors.copy(), turn, self._note)
        return WorkerTurns(*settings, self._workers) if self._workers else LocalTurns(*settings)

    def _step(self, consumed: int, next_turn: Callable[[], Turn]) -> Step:
        size = self._sizes.size_at(consumed)
        turns = [next_turn() for _ in range(size // self._stream.corpus.streams)]
        batches = self._stream.assemble(self._sequences(turns), self._micro_batch_size)
        if self._pin_memory:
            batches = [batch.pin_memory() for batch in batches]
        return size, batches, np.concatenate([turn.moves for turn in turns])

    def _sequences(self, turns: list[Turn]) -> Sequences:
        tokens = np.concatenate([turn.tokens for turn in turns])
        starts = np.concatenate([turn.starts for turn in turns])
        sources = np.concatenate([turn.sources for turn in turns])
        lengths = np.full(len(tokens), self._stream.seq_len, dtype=np.int64)
        return Sequences(tokens, starts, lengths, self._stream.source_languages[sources], sources)

    def _note(self, row: BadRow) -> None:
        self.bad_rows[row.source] += 1
        if self._report is not None and self.bad_rows.total() <= MOST_REPORTED:
            self._report(f"left out {row.where}: {row.problem}")


class _Turns(Protocol):
    def next_turn(self) -> Turn: ...

    def close(self) -> None: ...


class _Ahead:
    """Steps prepared ahead by a thread."""

    def __init__(
        self, turns: _Turns, step: Callable[[int, Callable[[], Turn]], Step], consumed: int, prefetch: int
    ) -> None:
        self._turns, self._step = turns, step
        self._steps: Queue[Step | BaseException] = Queue(prefetch)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(consumed,), name="text-loader", daemon=True)
        self._thread.start()
        # the end of the interpreter would tear the thread from torch's code, which aborts the process
        atexit.register(self.close)

    def next_step(self) -> Step:
        step = self._steps.get()  # the thread ends with an error in the queue, or when it is told to
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        atexit.unregister(self.close)
        self._stopped.set()
        self._turns.close()
        with suppress(Empty):  # the thread may wait for room
            self._steps.get_nowait()
        self._thread.join()

    def _run(self, consumed: int) -> None:
        try:
            while not self._stopped.is_set():
                step = self._step(consumed, self._next_turn)
                consumed += step[0]
                self._put(step)
        except Stopped:
            return
        except BaseException as error:
            self._put(error)

    def _next_turn(self) -> Turn:
        if self._stopped.is_set():
            raise Stopped
        return self._turns.next_turn()

    def _put(self, item: Step | BaseException) -> None:
        while not self._stopped.is_set():
            with suppress(Full):
                self._steps.put(item, timeout=POLL_SECONDS)
                return


def _check_streams(sizes: BatchSizes, dp_size: int, streams: int) -> None:
    if streams % dp_size:
        raise DataError(f"data.streams: {streams} is not a multiple of the data-parallel size {dp_size}")
    for size in sizes.sizes:
        if size % streams:
            fits = gcd(streams, *sizes.sizes)
            raise DataError(f"global_batch_size: {size} is not a multiple of data.streams={streams}; {fits} would fit")
