"""Activation checkpointing: what a block keeps of its forward pass and what it computes again for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

T = TypeVar("T")

_KEPT_PACKETS = (
    *(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "_grouped_mm")),
    *(
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
        for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    ),
    *(
        getattr(torch.ops._c10d_functional, name)
        for name in ("all_to_all_single", "reduce_scatter_tensor", "all_gather_into_tensor")
    ),
)


def recomputed(mode: str, block: Callable[..., T], *arguments: object) -> T:
    """`block(*arguments)`, whose activations are computed again when the backward pass needs them.

    `mode` full keeps the arguments alone; selective also matrix products, attention and what came from other ranks.
    """
    if mode == "full":
        return checkpoint(block, *arguments, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)


def _policy(
    context: object, operator: torch._ops.OpOverload, *arguments: object, **options: object
) -> CheckpointPolicy:
    is_kept = operator.overloadpacket in _KEPT_PACKETS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
