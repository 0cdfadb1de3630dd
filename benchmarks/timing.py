"""How the GPU benchmarks measure: time, peak memory, and waiting for the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Measured(NamedTuple):
    milliseconds: float
    """Of a pass that finds the device idle, and waits for the host's launches."""
    queued_milliseconds: float
    """Of a pass behind another, the host ahead, as in a training step."""
    peak_gib: float
    """Above parameters, inputs and gradients, whose memory is counted as if allocated beforehand."""
    waits: bool
    """Whether a pass copies to the host or otherwise waits for the device."""


def milliseconds(step: Callable[[], object], repeats: int = 20, warmups: int = 5) -> float:
    """Median over `repeats` runs, each between two events; the device is idle when one begins."""
    times = []
    for _ in range(warmups + repeats):
        start, end = _event(), _event()
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warmups:])


def queued_milliseconds(step: Callable[[], object], repeats: int = 20, warmups: int = 5) -> float:
    """Median over `repeats` runs one behind the other, from event to event; the host waits for the last one alone."""
    events = [_event() for _ in range(warmups + repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in list(pairwise(events))[warmups:])


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def measure(layer: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, grad: Tensor) -> Measured:
    """Forward and backward passes of `layer` at x."""
    leaves = [x, *parameters]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(grad)

    step()
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()  # gradients of the last pass are part of it
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return Measured(milliseconds(step), queued_milliseconds(step), peak, waits_for_device(step))


def waits_for_device(step: Callable[[], object]) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
