"""How far a preparation is: a bar on a terminal, a line every few seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts bytes of the files against their sum, and tokens; may be called from any thread.

    A context manager; the bar goes away at its end.
    """

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._lock = threading.Lock()
        self._tokens = 0
        self._started = self._printed = time.monotonic()
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="B",
            unit_scale=True,
            desc="prepare",
            disable=quiet or not self._is_terminal,
            leave=False,
        )
        self._total, self._initial, self._done = total, done, done

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, num_bytes: int, tokens: int) -> None:
        """Note `num_bytes` more of the files and `tokens` more ids."""
        with self._lock:
            self._done += num_bytes
            self._tokens += tokens
            if self._quiet:
                return
            if self._is_terminal:
                self._bar.set_postfix_str(self._rate(), refresh=False)
                self._bar.update(num_bytes)
            elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
                self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        line = tqdm.format_meter(
            self._done,
            self._total,
            self._printed - self._started,
            ncols=0,
            unit="B",
            unit_scale=True,
            prefix="prepare",
            initial=self._initial,
            postfix=self._rate(),
        )
        print(line, file=sys.stderr, flush=True)

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        return f"{tqdm.format_sizeof(self._tokens / seconds)} tokens/s"


class UnitProgress:
    """One unit's part in the progress: text is counted as it comes, up to the unit's size, the rest at its end."""

    def __init__(self, progress: Progress, num_bytes: int) -> None:
        self._progress = progress
        self._left = num_bytes

    def report(self, text_bytes: int, tokens: int) -> None:
        """Note text and ids that were made."""
        step = min(text_bytes, self._left)
        self._left -= step
        self._progress.advance(step, tokens)

    def finish(self) -> None:
        """Note that the unit is done."""
        self._progress.advance(self._left, 0)
        self._left = 0
