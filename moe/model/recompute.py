"""Activation checkpointing: what a block keeps of its forward pass and what it computes again for the backward pass."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

KEPT = {
    *(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "_grouped_mm")),
    *(
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
        for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    ),
    *(
        getattr(torch.ops._c10d_functional, name)
        for name in ("all_to_all_single", "reduce_scatter_tensor", "all_gather_into_tensor")
    ),
}
"""Operators whose results `selective` keeps: matrix products, attention, exchanges between ranks."""
KEPT_PACKAGES = ("moesaic", "flash_attn", "flash_attn_3")
"""Packages of whose operators it keeps all results; they exist only where a backend needs them."""


def recomputed(mode: str, block: Callable[..., T], *arguments: object) -> T:
    """`block(*arguments)`, whose activations are computed again when the backward pass needs them.

    `mode` full keeps the arguments alone, selective also the results of KEPT.
    """
    if mode == "full":
        return checkpoint(block, *arguments, use_reentrant=False)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    # torch's own selective contexts ask for the same operators in both passes; FSDP gathers weights in the first alone
    results: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(results), _Replay(results)


class _Keep(TorchDispatchMode):
    """Remembers the results of KEPT, in order."""

    def __init__(self, results: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_kept(func):
            self.results[func].append(_detached(result))
        return result


class _Replay(_Keep):
    """Returns them instead of computing them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_kept(func):
            return _detached(self.results[func].popleft())
        return func(*args, **(kwargs or {}))


def _is_kept(func: Any) -> bool:
    return func.overloadpacket in KEPT or func.namespace in KEPT_PACKAGES


def _detached(result: Any) -> Any:
    """Tensors that autograd may mark anew."""
    if isinstance(result, Tensor):
        return result.detach()
    return tuple(map(_detached, result)) if isinstance(result, tuple) else result
