"""Expert parallelism: the dispatcher that brings tokens to experts on other ranks and their outputs back.

    (N, H) --sort by expert--> (N K, H) --all-to-all--> (R, H) --sort by own expert--> experts --reversed--> (N, H)

Dropless: what a rank receives depends on the routing alone, from nothing to everything. The sizes are exchanged first
and copied to the host once; that is the only time a dispatch waits for the device. Rows travel while the shared experts
work, forward and backward: `dispatch` starts the exchange, `receive` waits for it, and in the backward pass `receive`
starts the way back and `dispatch` waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.permute import Permutation, combine_rows, gather_rows, sort_by_expert, ungather_rows
from moe.model.router import KeptChoice, Routing
from moe.parallel.layout import expert_share


@dataclass(frozen=True)
class Sizes:
    """How many rows one dispatch exchanges."""

    sent: list[int]
    """To each rank."""
    received: list[int]
    """From each rank."""
    by_source: Tensor
    """(P, own experts) int64: rows from each rank for each expert of this one."""


@dataclass(frozen=True)
class Travelling:
    """Rows on their way to their experts, and all that is needed to bring the outputs back."""

    rows: Tensor
    """(R, H), undefined until received."""
    way: _Way
    by_expert: Permutation
    """Of this rank's N K slots, by expert of the whole layer."""
    by_own_expert: Permutation
    """Of the R received rows, by expert of this rank."""


class ExchangeDispatcher:
    """The dispatcher (see `moe.model.experts.Dispatcher`) of experts that the ranks of `group` share out.

    Args:
        num_experts: of the layer, E; each rank holds a consecutive run of them (`expert_share`).
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts, self.group = num_experts, group
        parts = dist.get_world_size(group)
        self.shares = [len(expert_share(num_experts, parts, part)) for part in range(parts)]
        self.num_own = self.shares[dist.get_rank(group)]

    def dispatch(self, x: Tensor, routing: Routing, valid: Tensor, kept: KeptChoice | None) -> Travelling:
        """(N, H) tokens -> rows under way to their experts."""
        by_expert = sort_by_expert(routing.expert_indices, self.num_experts, valid)
        sizes = self._sizes(by_expert.tokens_per_expert, kept)
        rows = gather_rows(x, by_expert)[: sum(sizes.sent)]  # those of padding come last and stay
        own = torch.arange(self.num_own, device=x.device).repeat(len(self.shares))
        own = own.repeat_interleave(sizes.by_source.flatten(), output_size=sum(sizes.received))
        way = _Way(sizes.received, sizes.sent, self.group)
        return Travelling(way.start(rows), way, by_expert, sort_by_expert(own[:, None], self.num_own))

    def receive(self, travelling: Travelling) -> tuple[Tensor, Tensor]:
        """-> (R, H) rows sorted by this rank's experts, and how many each has, (own experts,)."""
        rows = travelling.way.finish(travelling.rows)
        return gather_rows(rows, travelling.by_own_expert), travelling.by_own_expert.tokens_per_expert

    def combine(self, rows: Tensor, routing: Routing, travelled: Travelling) -> Tensor:
        """(R, H) outputs of this rank's experts -> (N, H), each token's weighted by its gate values."""
        back = _Way(travelled.way.input_sizes, travelled.way.output_sizes, self.group)
        rows = back.finish(back.start(ungather_rows(rows, travelled.by_own_expert)))
        missing = len(travelled.by_expert.slot_of_row) - len(rows)  # those of padding
        return combine_rows(F.pad(rows, (0, 0, 0, missing)) if missing else rows, routing.weights, travelled.by_expert)

    def _sizes(self, tokens_per_expert: Tensor, kept: KeptChoice | None) -> Sizes:
        """Exchanged once; a recomputation finds them kept."""
        if kept is not None and isinstance(kept.sizes, Sizes):
            return kept.sizes
        by_source = tokens_per_expert.new_empty(len(self.shares) * self.num_own)
        received = [self.num_own] * len(self.shares)
        dist.all_to_all_single(by_source, tokens_per_expert, received, self.shares, group=self.group)
        by_source = by_source.view(len(self.shares), self.num_own)
        sent = torch.stack([part.sum() for part in tokens_per_expert.split(self.shares)])
        with _waiting_allowed():
            on_host = torch.stack([sent, by_source.sum(dim=1)]).tolist()
        sizes = Sizes(sent=on_host[0], received=on_host[1], by_source=by_source)
        if kept is not None:
            kept.sizes = sizes
        return sizes


class _Way:
    """An all-to-all in two halves, so that other work can be done between them, forward and backward."""

    def __init__(self, output_sizes: list[int], input_sizes: list[int], group: dist.ProcessGroup) -> None:
        self.output_sizes, self.input_sizes, self.group = output_sizes, input_sizes, group
        self.gradient: Tensor | None = None
        """On the way back; autograd would not carry it from half to half, as its shape is not that of the rows."""

    def start(self, rows: Tensor) -> Tensor:
        """The result may be looked at after `finish` only."""
        return _Start.apply(rows, self)

    def finish(self, rows: Tensor) -> Tensor:
        return _Finish.apply(rows, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return _exchange(rows, way.output_sizes, way.input_sizes, way.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.way.gradient = ctx.way.gradient, None
        return torch.ops._c10d_functional.wait_tensor(gradient), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return torch.ops._c10d_functional.wait_tensor(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.way.gradient = _exchange(grad, ctx.way.input_sizes, ctx.way.output_sizes, ctx.way.group)
        return grad, None  # for its shape; `_Start` takes the other


def _exchange(rows: Tensor, output_sizes: list[int], input_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    # the functional form is an operator, which activation checkpointing can keep
    return torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), output_sizes, input_sizes, group.group_name)


@contextmanager
def _waiting_allowed() -> Iterator[None]:
    """Suspend `runtime.detect_sync`."""
    mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    if not mode:
        yield
        return
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
