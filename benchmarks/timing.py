"""How the GPU benchmarks measure: time, peak memory, and waiting for the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Measured(NamedTuple):
    milliseconds: float
    peak_gib: float
    """Above parameters, inputs and gradients, whose memory is counted as if allocated beforehand."""
    waits: bool
    """Whether a pass copies to the host or otherwise waits for the device."""


def milliseconds(step: Callable[[], object], repeats: int = 20, warmups: int = 5) -> float:
    """Median over `repeats` runs, each between two events."""
    times = []
    for _ in range(warmups + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warmups:])


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
    return Measured(milliseconds(step), peak, waits_for_device(step))


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
