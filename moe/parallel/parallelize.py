"""The one function that turns the single-device model into what a run executes, always in this order:
activation checkpointing -> compile -> FSDP2.

Precision has one mechanism on every world size, one included: parameters are float32 masters held by FSDP2; its
mixed-precision policy hands blocks a copy in the compute dtype, kept across the micro-batches of a step so that the
cast is paid once; gradients accumulate and reduce in float32. Routers are groups of their own whose policy is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from moe.config.schema import RuntimeConfig
from moe.model import Block, MoE, Transformer
from moe.model.router import TopKRouter
from moe.parallel.world import World


def parallelize(model: Transformer, world: World, compute_dtype: torch.dtype, runtime: RuntimeConfig) -> None:
    """Prepare `model`, whose float32 parameters are on `world.device`, in place; parameter names stay as they are."""
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.recompute = runtime.activation_checkpointing
        if isinstance(block.mlp, MoE):
            block.mlp.pool = world.sum
    if runtime.compile:
        _compile(model, compute_dtype)
    _shard(model, world, compute_dtype)


def _compile(model: Transformer, compute_dtype: torch.dtype) -> None:
    """Compile what has static shapes, each part on its own.

    A local dispatch has them too: N K rows however they are routed. One that exchanges rows between ranks has not, and
    must stay between compiled regions.
    """
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.attend = torch.compile(block.attend)  # type: ignore[method-assign]
        if isinstance(block.mlp, MoE):
            _compile_mixture(block.mlp, compute_dtype)
        else:
            block.mlp.compile()
    if model.lm_head is not None:
        model.lm_head.chunk_loss = torch.compile(model.lm_head.chunk_loss)  # type: ignore[method-assign]


def _compile_mixture(mixture: MoE, compute_dtype: torch.dtype) -> None:
    if isinstance(mixture.gate, TopKRouter):
        mixture.gate.score = torch.compile(mixture.gate.score)  # type: ignore[method-assign]
    if mixture.experts.backend == "grouped_mm" and compute_dtype == torch.bfloat16:  # torch traces it in no other dtype
        mixture.routed = torch.compile(mixture.routed)  # type: ignore[method-assign]
    if mixture.config.seq_aux:  # the pooled form may all-reduce
        mixture.statistics = torch.compile(mixture.statistics)  # type: ignore[method-assign]
    if mixture.shared_experts is not None:
        mixture.shared_experts.compile()


def _shard(model: Transformer, world: World, compute_dtype: torch.dtype) -> None:
    # inputs are cast by the model itself: FSDP would round the rotary angles and the gate weights to the compute dtype
    compute = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers.values():
        if isinstance(block.mlp, MoE) and isinstance(block.mlp.gate, TopKRouter):
            fully_shard(block.mlp.gate, mesh=world.mesh, mp_policy=exact, reshard_after_forward=False)
        fully_shard(block, mesh=world.mesh, mp_policy=compute, reshard_after_forward=False)
    fully_shard(model, mesh=world.mesh, mp_policy=compute, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gradients are divided once, by the step's global token count, inside the loss
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def mark_last_micro_batch(model: Transformer, is_last: bool) -> None:
    """Only the last backward pass of a step reduces gradients and frees the compute copies."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last)
    model.set_reshard_after_backward(is_last)
    model.set_is_last_backward(is_last)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
