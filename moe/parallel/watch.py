"""Every process is watched by another: when one dies, fails or hangs, all end soon, with a line that names it.

A thread of each rank leaves a beat in the store that all ranks share, once a round, on a connection of its own. Rank 0
reads all beats and judges; the others read rank 0's. A judgement is one key of the store, which every rank reads every
round. Who finds one there prints it and ends at once, from the thread: the main thread may be in a collective that
never returns, as NCCL's do when a peer is gone. A second thread never touches the store and ends the process when the
store no longer answers.

Who hangs is told by counting: every rank begins the same collectives in the same order, so when nothing moves any more,
the ranks that have begun fewest are those that the others wait for.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from data.errors import complaint, one_line

EXIT_PEER_FAILED = 79
ROUND = 1.0
"""Seconds between two beats; the times below are in rounds."""
TO_FAIL_ALIKE = 2
"""Between reading of a failure and ending because of it: what failed there may fail here too, and then says more."""
TO_BE_READ = 3
"""How much longer than the others rank 0 stays, since the store may end with it."""
TO_CLOSE = 10
"""How long, on top of a silent rank's, this process may go without a round: closing files and process groups after an
error of its own may hang, and so may the store."""


class PeerFailure(RuntimeError):
    """The ranks cannot reach each other, and it is not known which of them is to blame."""


class Beat(NamedTuple):
    """What a rank says of itself once a round."""

    number: int = 0
    """Grows while the process lives; 0: it has not joined yet."""
    host: str = "unknown"
    collectives: int = 0
    """How many this rank has begun."""
    done: bool = False


class Judgement(NamedTuple):
    """Which ranks are to blame for what, as recorded in the store."""

    ranks: list[int]
    line: str


class Unchanged:
    """For how many looks in a row a value has been the same. Looks, not seconds: a process that was suspended itself
    has not seen the others fall silent."""

    def __init__(self) -> None:
        self._looks = 0
        self._value: object = None

    def look(self, value: object) -> int:
        self._looks = self._looks + 1 if value == self._value else 0
        self._value = value
        return self._looks


class Watch:
    """Context manager around all that the ranks do together; without effect in a world of one.

    Leaving it with an error tells the others, which end with exit code EXIT_PEER_FAILED. If the error only says that
    another rank is gone, this process ends that way too, naming it. Left in good order, rank 0 waits for all others.

    Raises:
        PeerFailure: on leaving, a collective broke although all ranks live.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: int, keeper: str = "rank 0") -> None:
        """store: where the `size` ranks met, without keys of an earlier run. timeout: seconds after which a rank that
        waits for another gives up. keeper: who keeps the store, for people."""
        self._rank, self._size, self._timeout = rank, size, timeout
        self._silence = max(5, min(30, timeout))  # loading a large library can hold the interpreter's lock for long
        self._store, self._keeper = store, f"{keeper}, which keeps the store that all ranks share,"
        self._rounds = 0
        self._others = range(1, size) if rank == 0 else range(1)
        self._still = {other: Unchanged() for other in self._others}
        self._all_still = Unchanged()
        self._error = ""
        self._wake, self._done, self._failing, self._over = (threading.Event() for _ in range(4))
        self._last_word = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._guard = threading.Thread(target=self._guard_rounds, name="watch-store", daemon=True)

    def __enter__(self) -> Watch:
        if self._size > 1:
            self._store = self._store.clone()  # type: ignore[attr-defined]
            self._watcher.start()
            self._guard.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.report(error)
        elif self._size > 1:
            self._done.set()
            self._wake.set()
            self._watcher.join()
            self._over.set()

    def report(self, error: BaseException) -> None:
        """Tell the others that this rank fails; to be called before closing what may hang. Only the first call counts.

        Raises:
            PeerFailure: as the class says.
        """
        if self._size == 1 or self._failing.is_set():
            return
        echo = _find_echo(error)
        if echo is not None:
            time.sleep((self._silence + TO_FAIL_ALIKE + TO_BE_READ) * ROUND)  # the watcher ends the process meanwhile
            error = PeerFailure(f"all ranks live, but they cannot work together: {' '.join(str(echo).split())}")
        self._error = " ".join(f"{type(error).__name__}: {complaint(error)}".split())
        self._failing.set()
        self._wake.set()
        with suppress(RuntimeError):  # the store is gone, and the others know
            self._record(Judgement([self._rank], f"{_name({self._rank: _host()})} failed: {self._error}"))
        if self._rank == 0:
            time.sleep(TO_BE_READ * ROUND)
        if echo is not None:
            raise error from echo

    # What follows runs on the watcher's thread.

    def _watch(self) -> None:
        try:
            self._reserve()
            began = time.monotonic()
            while not self._failing.is_set() and not self._look():
                self._wake.wait(max(0.0, began + ROUND - time.monotonic()))
                self._wake.clear()
                began = time.monotonic()
        except RuntimeError as error:  # the store's
            if not self._failing.is_set():
                self._end(f"{self._keeper} is gone: {one_line(error)}")

    def _reserve(self) -> None:
        """Create the keys to be read, empty where they are not there yet: reading waits for missing ones."""
        for key in self._keys:
            self._store.compare_set(key, "", "")

    @property
    def _keys(self) -> list[str]:
        return ["failure", *(f"beat/{other}" for other in self._others)]

    def _look(self) -> bool:
        """One round; True when there is nothing left to watch."""
        self._rounds += 1
        own = Beat(self._rounds, _host(), _collectives_begun(), self._done.is_set())
        self._store.set(f"beat/{self._rank}", json.dumps(own))
        failure, *texts = self._store.multi_get(self._keys)
        beats = {other: _parse(text) for other, text in zip(self._others, texts, strict=True)}
        if failure:
            self._follow(Judgement(*json.loads(failure)))
        elif judgement := self._judge(beats, own):
            self._follow(self._record(judgement))
        return own.done and (self._rank > 0 or all(beat.done for beat in beats.values()))

    def _record(self, judgement: Judgement) -> Judgement:
        """Leave `judgement` in the store unless there is one; returns the one that stands."""
        return Judgement(*json.loads(self._store.compare_set("failure", "", json.dumps(judgement))))

    def _judge(self, beats: dict[int, Beat], own: Beat) -> Judgement | None:
        """Who is dead, or hangs, as seen this round."""
        what = "died without a word"
        blamed = [rank for rank, beat in beats.items() if not beat.done and self._is_silent(rank, beat)]
        if blamed and not beats[blamed[0]].number:
            what = "never joined the others"
        if not blamed and self._rank == 0:
            what = f"kept the others waiting for parallel.timeout={self._timeout} seconds"
            blamed = self._find_hanging({0: own} | beats)
        hosts = {rank: (own if rank == self._rank else beats[rank]).host for rank in blamed}
        return Judgement(blamed, f"{_name(hosts)} {what}") if blamed else None

    def _is_silent(self, rank: int, beat: Beat) -> bool:
        return self._still[rank].look(beat.number) >= (self._silence if beat.number else self._timeout)

    def _find_hanging(self, beats: dict[int, Beat]) -> list[int]:
        """The ranks that have begun fewest collectives, when no rank has begun one for the timeout; empty if all have
        begun as many, for then nobody is known to wait."""
        begun = {rank: float(beat.collectives) for rank, beat in beats.items() if not beat.done}
        if beats[0].done:  # it waits for all others to be done
            begun[0] = math.inf
        fewest = min(begun.values())
        if self._all_still.look(begun) < self._timeout or fewest == max(begun.values()):
            return []
        return [rank for rank in begun if begun[rank] == fewest]

    def _follow(self, judgement: Judgement) -> None:
        """End because of a judgement, unless the main thread is just failing in a way of its own."""
        if self._failing.wait(TO_FAIL_ALIKE * ROUND):
            return
        if self._rank == 0:
            time.sleep(TO_BE_READ * ROUND)
        self._end(judgement.line, show_stacks=self._rank in judgement.ranks)

    # And this on the guard's, which must never wait for the store.

    def _guard_rounds(self) -> None:
        still = Unchanged()
        while not self._over.wait(ROUND):
            if still.look(self._rounds) >= self._silence + TO_CLOSE:
                hung = f"{self._error}; closing files and process groups then hung"
                self._end(hung if self._error else f"{self._keeper} does not answer")

    def _end(self, failure: str, show_stacks: bool = False) -> NoReturn:
        """Say why and end, even if the main thread never returns."""
        with self._last_word:
            try:
                print(f"error: {failure}", file=sys.stderr, flush=True)
                if show_stacks:
                    faulthandler.dump_traceback()
            finally:
                os._exit(EXIT_PEER_FAILED)


def _host() -> str:
    return socket.gethostname()


def _parse(text: bytes) -> Beat:
    return Beat(*json.loads(text)) if text else Beat()


def _name(hosts: dict[int, str]) -> str:
    """`rank 3 (host a)` or `ranks 3, 4 (hosts a, b)`."""
    plural = "s" * (len(hosts) > 1)
    places = sorted(set(hosts.values()))
    return f"rank{plural} {', '.join(map(str, hosts))} (host{'s' * (len(places) > 1)} {', '.join(places)})"


def _collectives_begun() -> int:
    """How many collectives this process has begun, over all groups; the groups count them."""
    groups = list(distributed_c10d._world.pg_map)
    backends = (group._get_backend(device) for group in groups for device in group._device_types)
    return sum(backend._get_sequence_number_for_group() for backend in backends)  # type: ignore[attr-defined]


def _find_echo(error: BaseException | None) -> RuntimeError | None:
    """The failure of a collective or of the store that `error` stems from: what the others meet when a rank is gone."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None
