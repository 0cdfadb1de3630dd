"""What GPUs can do, from their datasheets, and what of it training attains, as measured: the only table of both."""

from __future__ import annotations

from typing import NamedTuple


class GPU(NamedTuple):
    """Datasheet figures of one GPU and its share of the node's network."""

    device_name: str
    """A part of the name that the driver gives it."""
    peak_tflops: float
    """Dense bfloat16 TFLOP/s."""
    memory_gib: float
    """Of what is printed on it, as much as a process can allocate."""
    memory_bandwidth: float
    """GB/s."""
    link_bandwidth: float
    """GB/s to the GPUs of the same node in one direction: NVLink, or PCIe where there is none."""
    network_bandwidth: float
    """GB/s to other nodes in one direction: an InfiniBand port a GPU, 400 Gbit/s (A100, A800, L40S: 200; 4090: 100)."""

    @property
    def is_hopper(self) -> bool:
        return self.device_name.startswith("H")


GPUS = {
    "b200": GPU("B200", 2250.0, 178.0, 8000.0, 900.0, 50.0),
    "h200": GPU("H200", 989.0, 139.8, 4800.0, 450.0, 50.0),
    "h100": GPU("H100", 989.0, 79.1, 3350.0, 450.0, 50.0),
    "h100_pcie": GPU("H100 PCIe", 756.0, 79.1, 2000.0, 64.0, 50.0),
    "h800": GPU("H800", 989.0, 79.1, 3350.0, 200.0, 50.0),
    "a100": GPU("A100", 312.0, 79.1, 2039.0, 300.0, 25.0),
    "a800": GPU("A800", 312.0, 79.1, 2039.0, 200.0, 25.0),
    "l40s": GPU("L40S", 362.0, 44.4, 864.0, 32.0, 25.0),
    "rtx_4090": GPU("RTX 4090", 165.0, 23.5, 1008.0, 32.0, 12.5),
}


class Attained(NamedTuple):
    """Shares of the datasheet's figures that a training step attains: fitted to 369 ms of `moe_2b` on an H200, 65,536
    tokens in one micro-batch, whose parts docs/log.md lists; what is assumed says so."""

    dense: float = 0.62
    """Of the peak: dense matrix products (8192^3 alone: 0.77)."""
    grouped: float = 0.57
    """Of the peak: the experts' matrix products."""
    fullest_rank: float = 1.15
    """Time of the experts' products over that of an even load, where ranks share out experts: all wait for the fullest,
    and for the host to hear how much comes. Fitted to `moe_2b` on two H200s and two H100s, expert 2."""
    attention: float = 0.43
    """Of the peak: causal attention forward and backward, FLOPs of the causal half counted."""
    memory: float = 0.50
    """Of the memory's bandwidth: operations between the matrix products."""
    stream: float = 0.82
    """Of the memory's bandwidth: the optimizer. Measured on an H200, AdamW by its own kernel (`moe.kernels.adamw`)."""
    links: float = 0.55
    """Of the links inside a node: collectives. Two H100s and two H200s attained 0.50 to 0.64."""
    network: float = 0.80
    """Of the network between nodes: collectives. Assumed."""
    call_seconds: float = 20e-6
    """Until a collective starts. Assumed."""
    split_call_seconds: float = 450e-6
    """The same along `tensor`, with the host's work on split tensors: fitted to `moe_2b` on two H100s, tensor 2."""


def find_gpu(device_name: str) -> GPU | None:
    """By the driver's name for it, the most precise match; None where it is not in the table."""
    found = [gpu for gpu in GPUS.values() if gpu.device_name in device_name]
    return max(found, key=lambda gpu: len(gpu.device_name), default=None)
