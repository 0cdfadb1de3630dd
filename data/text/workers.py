"""Turns of a rank's streams, dealt in this process or by worker processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, Full, Queue

import numpy as np

from data.errors import DataError
from data.processes import start_worker
from data.spec import StreamSpec
from data.text.corpus import TextCorpus
from data.text.cursor import pack_cursors
from data.text.deal import Dealer, Turn
from data.text.messages import BAD_ROW, ERROR, FILE, TURN, job_of, receive, unpack_turn
from data.text.reader import BadRow, Reader

# Signals that end a run reach workers too; they are the parent's business from the first moment on.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "from data.text.worker import main; main()"
)
TURNS_AHEAD = 8
POLL_SECONDS = 0.2
SILENCE_SECONDS = 900.0


class Stopped(Exception):
    """The loader is being closed."""


class LocalTurns:
    """Turns dealt in this process."""

    def __init__(
        self,
        corpus: TextCorpus,
        spec: StreamSpec,
        streams: Sequence[int],
        cursors: np.ndarray,
        turn: int,
        on_bad_row: Callable[[BadRow], object],
    ) -> None:
        self._dealer = Dealer(corpus, spec, streams, cursors, turn, Reader(corpus, on_bad_row=on_bad_row))

    def next_turn(self) -> Turn:
        """One sequence of every stream. DataError: a source cannot be read."""
        return self._dealer.next_turn()

    def close(self) -> None:
        """Nothing to end."""


class WorkerTurns:
    """Turns dealt by `workers` processes, each of which has every `workers`-th stream."""

    def __init__(
        self,
        corpus: TextCorpus,
        spec: StreamSpec,
        streams: Sequence[int],
        cursors: np.ndarray,
        turn: int,
        on_bad_row: Callable[[BadRow], object],
        workers: int,
    ) -> None:
        self._num_streams, self._width = len(streams), spec.seq_len + 1
        self._workers: list[_Worker] = []
        try:
            for number in range(workers):
                own = list(streams[number::workers])
                job = job_of(corpus, spec, own, pack_cursors(cursors[number::workers]), turn)
                self._workers.append(_Worker(number, job, spec.seq_len, corpus.token_type, on_bad_row))
        except BaseException:
            self.close()
            raise

    def next_turn(self) -> Turn:
        """One sequence of every stream.

        Raises:
            DataError: a source cannot be read, or a worker died or does not answer.
            Stopped: `close` was called.
        """
        parts = [worker.next_turn() for worker in self._workers]
        step = len(parts)
        tokens = np.empty((self._num_streams, self._width), parts[0].tokens.dtype)
        starts = np.empty(tokens.shape, np.bool_)
        sources = np.empty(self._num_streams, np.int64)
        for number, part in enumerate(parts):
            tokens[number::step], starts[number::step], sources[number::step] = part.tokens, part.starts, part.sources
            part.moves[:, 0] = part.moves[:, 0] * step + number
        return Turn(tokens, starts, sources, np.concatenate([part.moves for part in parts]))

    def close(self) -> None:
        """End the processes and wait for them. May be called from any thread."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()


class _Worker:
    """A process, and the thread that receives from it."""

    def __init__(
        self, number: int, job: bytes, seq_len: int, token_type: np.dtype, on_bad_row: Callable[[BadRow], object]
    ) -> None:
        self._name = f"data worker {number}"
        self._seq_len, self._token_type = seq_len, token_type
        self._on_bad_row = on_bad_row
        self._file = "no file yet"
        self._stopped = threading.Event()
        self._turns: Queue[Turn | DataError] = Queue(TURNS_AHEAD)
        self._process = start_worker("-c", START, bufsize=1 << 20)
        self._thread = threading.Thread(target=self._receive, args=(job,), name=self._name, daemon=True)
        self._thread.start()

    def next_turn(self) -> Turn:
        deadline = time.monotonic() + SILENCE_SECONDS
        while not self._stopped.is_set():
            try:
                turn = self._turns.get(timeout=POLL_SECONDS)
            except Empty:
                if time.monotonic() > deadline:
                    silence = f"has not answered for {SILENCE_SECONDS:.0f} s"
                    raise DataError(f"{self._name} {silence}, the last file it read is {self._file}") from None
                continue
            if isinstance(turn, DataError):
                raise turn
            return turn
        raise Stopped

    def kill(self) -> None:
        self._stopped.set()
        self._process.kill()
        with suppress(Empty):  # the thread may wait for room
            self._turns.get_nowait()

    def join(self) -> None:
        self._thread.join()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()

    def _receive(self, job: bytes) -> None:
        try:
            self._receive_turns(job)
        except Exception as error:  # whatever it is, the loader has to hear of it
            self._put(DataError(f"{self._name}: {error}"))

    def _receive_turns(self, job: bytes) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(OSError):  # it has died: its output ends
            stdin.write(job)
            stdin.flush()
        while message := receive(stdout):  # type: ignore[arg-type]
            kind, content = message
            if kind == TURN:
                self._put(unpack_turn(content, self._seq_len, self._token_type))
            elif kind == FILE:
                self._file = content.decode()
            elif kind == BAD_ROW:
                self._on_bad_row(BadRow(**json.loads(content)))
            elif kind == ERROR:
                self._put(DataError(content.decode()))
        self._put(self._death())

    def _death(self) -> DataError:
        code = self._process.wait()
        cause = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        advice = "; fewer data.workers need less memory" if code == -9 else ""
        return DataError(f"{self._name} {cause}, the last file it read is {self._file}{advice}")

    def _put(self, item: Turn | DataError) -> None:
        while not self._stopped.is_set():
            with suppress(Full):
                self._turns.put(item, timeout=POLL_SECONDS)
                return
