"""The device of this process: its peak for MFU, its peak memory, its name."""

from __future__ import annotations

import resource
import sys

import torch

from moe.hardware import find_gpu


def peak_tflops(device: torch.device, compute_dtype: str) -> float | None:
    """Dense peak of one device, or None where it is not known: CPUs, other GPUs, float32."""
    if device.type != "cuda" or compute_dtype != "bfloat16":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.peak_tflops if gpu else None


def peak_memory_gib(device: torch.device) -> float:
    """Largest device memory allocated so far; on a CPU the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
