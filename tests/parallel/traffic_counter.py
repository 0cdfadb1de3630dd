"""Counts the collectives of this process as they are called, forward and backward, by axis and kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.parallel import World

_KINDS = {
    "all_gather": ("_allgather_base_", "all_gather_into_tensor", "all_gather_into_tensor_coalesced"),
    "reduce_scatter": ("_reduce_scatter_base_", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"),
    "all_reduce": ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_coalesced"),
    "all_to_all": ("alltoall_base_", "all_to_all_single"),
}
KIND = {operator: kind for kind, operators in _KINDS.items() for operator in operators}
NAMESPACES = ("c10d", "_c10d_functional")
NOT_COUNTED = {"wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_"}
"""They carry nothing."""


class TrafficCounter(TorchDispatchMode):
    """Sums bytes and calls by (axis, collective), in the convention of `moe.planning.traffic`.

    Raises AssertionError on a collective, or a group of several ranks, that it does not know: nothing goes uncounted.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.axes = axes_of_ranks(world)
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come here as those of plain tensors
        name = func.overloadpacket.__name__
        if func.namespace in NAMESPACES and name not in NOT_COUNTED:
            self._count(KIND[name], name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, operator: str, args: tuple[Any, ...]) -> None:
        group = next(group for group in map(_group, args) if group is not None)
        if group.size() == 1:
            return
        key = self.axes[ranks_of(group)], kind
        size = _bytes(args[1] if operator.endswith("base_") else args[0])
        if kind == "all_gather":
            size *= group.size()
        self.bytes[key] += size
        self.calls[key] += 1


def axes_of_ranks(world: World) -> dict[tuple[int, ...], str]:
    """By the ranks of a group its axis, or those that have them in common, joined: `tensor, expert`.

    Not by the group: torch keeps meshes of DTensors, and with them the groups of an earlier world of the same ranks.
    """
    dense = [(axis, world.dense.get_group(axis)) for axis in ("replicate", "shard", "tensor")]
    sparse = [(axis, world.sparse.get_group(axis)) for axis in ("expert_shard", "expert")]
    names: dict[tuple[int, ...], list[str]] = {}
    for axis, group in [*dense, *sparse, ("all", world.group)]:
        names.setdefault(ranks_of(group), []).append(axis)
    return {ranks: ", ".join(axes) for ranks, axes in names.items()}


def ranks_of(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, str) and argument not in ("sum", "max", "avg"):
        return dist.distributed_c10d._resolve_process_group(argument)
    if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
        return dist.ProcessGroup.unbox(argument)
    return None


def _bytes(tensors: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
