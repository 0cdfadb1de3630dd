"""What the hardware could do and what it holds: peaks for MFU, peak memory."""

from __future__ import annotations

import resource
import sys

import torch

# Dense bf16 TFLOP/s of the vendors' datasheets, by a part of the device's name; the first match counts.
_PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def peak_tflops(device: torch.device, compute_dtype: str) -> float | None:
    """Dense peak of one device, or None where it is not known: CPUs, other GPUs, float32."""
    if device.type != "cuda" or compute_dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16_TFLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Largest device memory allocated so far; on a CPU the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
