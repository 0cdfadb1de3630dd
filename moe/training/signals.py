"""SIGTERM, SIGINT and SIGUSR1 ask for a stop; all ranks act on it at the same step without waiting for the device."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """A flag that any rank may raise.

    On several ranks it rides on a reduction that every step does anyway: `tensor()` goes in, `observe()` takes the sum,
    and `agreed()` at the start of the next step reads the sum through a pinned copy that has long arrived. All ranks
    therefore stop at the same step.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.device, self.alone = device, world_size == 1
        self.requested = False
        self._pinned = torch.zeros((), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; a second one of the same kind ends the process at once."""
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)

    def value(self) -> float:
        return float(self.requested)

    def observe(self, total: Tensor) -> None:
        """`total` (): the flags summed over the ranks."""
        if self.alone:
            return
        self._pinned.copy_(total, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def agreed(self) -> bool:
        """Whether to stop now; the same answer on every rank."""
        if self.alone:
            return self.requested
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._pinned > 0)
