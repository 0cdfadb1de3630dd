"""Tensor and sequence parallelism: the ranks along `tensor` share the sequences of a micro-batch.

Between the matrices each rank holds its part of every sequence, (B, T / tensor, H), so norms, routers and routed
experts work on tokens of their own. Attention, dense and shared FFNs gather the sequence, split heads or width, and
scatter the sum. Embedding, head and loss split the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from moe.model import IGNORE_INDEX, MLP, Block, LMHead, MoE, Tokens, Transformer
from moe.model.head import project
from moe.parallel.world import World

SEQUENCE = Shard(1)


def split_tensors(model: Transformer, world: World) -> None:
    """Split the dense matrices of `model` over `tensor`, in place."""
    mesh = world.dense["tensor"]
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=SEQUENCE)
    }
    for index, block in model.layers.items():
        assert isinstance(block, Block)
        plan |= {f"layers.{index}.self_attn{name}": style for name, style in _attention_plan().items()}
        for name, module in block.named_modules():
            if isinstance(module, MLP):
                plan |= {f"layers.{index}.{name}{part}": style for part, style in _mlp_plan().items()}
                module.gate_up = partial(_gate_up_of_whole, module.gate_up, mesh)  # type: ignore[method-assign]
    parallelize_module(model, mesh, plan, src_data_rank=None)
    if model.embed_tokens is not None:
        # still on its way, and as such without a gradient in a compiled region; the copy waits for it
        model.embed_tokens.register_forward_hook(lambda module, ids, hidden: hidden.clone())
    model.own_tokens = lambda tokens: _own_part(tokens, world)
    if model.lm_head is not None:
        _split_head(model.lm_head, mesh)


def _attention_plan() -> dict[str, ParallelStyle]:
    others = (None,) * 4
    column, row = ColwiseParallel(), RowwiseParallel(output_layouts=SEQUENCE)
    gather = PrepareModuleInput(input_layouts=(SEQUENCE, *others), desired_input_layouts=(Replicate(), *others))
    return {"": gather, ".q_proj": column, ".k_proj": column, ".v_proj": column, ".o_proj": row}


def _mlp_plan() -> dict[str, ParallelStyle]:
    column, row = ColwiseParallel(), RowwiseParallel(output_layouts=SEQUENCE)
    return {".gate_proj": column, ".up_proj": column, ".down_proj": row}


def _gate_up_of_whole(
    gate_up: Callable[[Tensor], tuple[Tensor, Tensor]], mesh: DeviceMesh, x: Tensor
) -> tuple[Tensor, Tensor]:
    """`MLP.gate_up` of whole sequences, of this rank's part of the width."""
    return gate_up(_whole(x, mesh))


def _whole(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """(B, T / tensor, H), each rank's part -> (B, T, H)."""
    return DTensor.from_local(x, mesh, [SEQUENCE], run_check=False).redistribute(placements=[Replicate()])


def _own_part(tokens: Tokens, world: World) -> Tokens:
    """(B, T) -> (B, T / tensor), those whose hidden states this rank holds between the matrices."""
    return Tokens(*(tensor.chunk(world.layout.tensor, dim=1)[world.tensor_rank].contiguous() for tensor in tokens))


def _split_head(head: LMHead, mesh: DeviceMesh) -> None:
    """Every rank scores all tokens against its rows of the vocabulary."""
    head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)], src_data_rank=None))
    group = mesh.get_group()

    def gather(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments
        return _whole(hidden, mesh).to_local(grad_placements=[Partial()]), *others

    head.register_forward_pre_hook(gather)
    head.score = lambda hidden, weight, labels: _score_part(hidden, weight, labels, group)


def _score_part(hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """`moe.model.head.Score` of this rank's part of the vocabulary, (V / P, H); losses are equal on the P ranks, NaN
    where a label is in no part."""
    logits = project(hidden, weight)
    peak = logits.amax(dim=-1)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    exponentials = (logits - peak[:, None]).exp_()
    place = labels - dist.get_rank(group) * len(weight)
    is_own = (place >= 0) & (place < len(weight))
    place = torch.where(is_own, place, 0)[:, None]
    target = torch.where(is_own, logits.gather(1, place)[:, 0] - peak, 0)
    sums = torch.stack([exponentials.sum(dim=-1), target])
    dist.all_reduce(sums, group=group)
    ignored = labels == IGNORE_INDEX
    exists = (labels >= 0) & (labels < dist.get_world_size(group) * len(weight))
    losses = torch.where(ignored, 0, torch.where(exists, sums[0].log() - sums[1], torch.nan))
    grad = exponentials.div_(torch.where(ignored, torch.inf, sums[0])[:, None]).to(hidden.dtype)
    at_label = torch.where(is_own, torch.expm1(-losses).to(grad.dtype), grad.gather(1, place)[:, 0])
    return losses, grad.scatter_(1, place, at_label[:, None])


def split_statistics(model: Transformer, world: World) -> None:
    """Let balance losses see whole sequences, or all of a micro-batch over all ranks where they pool it."""
    for block in model.layers.values():
        if isinstance(block.mlp, MoE):
            block.mlp.pool = world.tensor_sum if block.mlp.config.seq_aux else world.sum
