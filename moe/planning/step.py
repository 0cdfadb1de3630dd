"""What one rank does in an optimizer step, as far as costs depend on it."""

from __future__ import annotations

from typing import NamedTuple

from moe.config import Config
from moe.hardware import GPU
from moe.kernels.experts import FUSED
from moe.parallel import Layout

FLOAT32 = INT32 = 4
INT64 = FLOAT64 = 8


class Step(NamedTuple):
    micro_batches: int
    sequences: int
    """Of a micro-batch; the ranks along `tensor` share them."""
    seq_len: int
    compute_bytes: int
    """Of one element of the compute dtype: 4 or 2."""
    num_languages: int
    loss_chunk_size: int
    recompute: str
    """none, selective or full."""
    reshard: bool
    kernels: str
    """What computes between the matrix products: operations on a CPU (`cpu`), on CUDA (`eager`), or `compiled` ones."""
    fused_experts: bool = False
    """Whether the routed experts are one operator (`moe.kernels.fused`), which keeps no more than gate and up."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.sequences * self.seq_len


def step_of(config: Config, layout: Layout, gpu: GPU | None = None) -> Step:
    """A step of `config`, its global batch cut as train.py cuts it; `gpu` decides what an expert backend of auto is."""
    train, runtime = config.train, config.runtime
    is_left_to_compiler = runtime.compile and runtime.activation_checkpointing == "selective"
    return Step(
        micro_batches=train.global_batch_size // (train.micro_batch_size * layout.data),
        sequences=train.micro_batch_size,
        seq_len=config.data.seq_len,
        compute_bytes={"float32": 4, "bfloat16": 2}[train.compute_dtype],
        num_languages=max(1, len({source.language for source in config.data.sources.values()})),
        loss_chunk_size=runtime.chunk_size(runtime.device),
        recompute="none" if is_left_to_compiler else runtime.activation_checkpointing,
        reshard=config.parallel.reshard,
        kernels="cpu" if runtime.device == "cpu" else "compiled" if runtime.compile else "eager",
        fused_experts=_are_experts_fused(config, gpu),
    )


def _are_experts_fused(config: Config, gpu: GPU | None) -> bool:
    backend = config.runtime.expert_backend
    if backend != "auto":
        return backend in FUSED
    if gpu is None or config.runtime.device == "cpu":
        return False
    return gpu.is_hopper and config.train.compute_dtype == "bfloat16"
