"""Expert parallelism: the dispatcher that brings tokens to experts on other ranks and their outputs back.

    (N, H) --a row for every rank with experts of the token--> (S, H) --all-to-all--> (M, H) tokens
    tokens --the experts here, weighted and summed--> (M, H) --all-to-all--> (S, H) --summed--> (N, H)

A token travels once to a rank, however many of its experts live there, and one sum of their outputs comes back; its
choices and gate values go with it. Dropless: what a rank receives depends on the routing alone, from nothing to
everything. The sizes are exchanged first and copied to the host once; that is the only time a dispatch waits for the
device. Rows travel while the shared experts work, forward and backward: `dispatch` starts the exchange, `receive` waits
for it, and in the backward pass `receive` starts the way back and `dispatch` waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.kernels.permute import Permutation, add_rows, gather_rows, leading_rows, sort_by_expert
from moe.model.experts import Visitors
from moe.model.router import KeptChoice, Routing
from moe.parallel.layout import expert_share


@dataclass(frozen=True)
class Sizes:
    """How much one dispatch exchanges."""

    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    choices: int
    """Of the received tokens, that fell on experts of this rank."""


@dataclass(frozen=True)
class Plan:
    """Where the tokens of a dispatch go."""

    by_rank: Permutation
    """Of this rank's N K slots, by rank; a token's first choice on a rank stands for the others there."""
    sizes: SizesUnderWay


@dataclass(frozen=True)
class Travelling:
    """Rows on their way to their experts, and all that is needed to bring the outputs back."""

    rows: Tensor
    """(M, H), undefined until received."""
    choices: Tensor
    """(M, 2 K) float32, likewise: gate values and experts, whose numbers float32 holds exactly."""
    way: _Way
    choices_way: _Way
    by_rank: Permutation
    """Of the S sent rows."""
    num_choices: int


class ExchangeDispatcher:
    """The dispatcher (see `moe.model.experts.Dispatcher`) of experts that the ranks of `group` share out.

    Args:
        num_experts: of the layer, E; each rank holds a consecutive run of them (`expert_share`).
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.group, self.parts = group, dist.get_world_size(group)
        self.share = len(expert_share(num_experts, self.parts, 0))
        self.own = expert_share(num_experts, self.parts, dist.get_rank(group))

    def plan(self, routing: Routing, valid: Tensor, kept: KeptChoice | None) -> Plan:
        """Sort the tokens by rank and start to exchange the sizes; a recomputation finds these kept."""
        by_rank, counts = _sort_by_rank(routing.expert_indices, self.share, self.parts, valid)
        if kept is not None and isinstance(kept.sizes, SizesUnderWay):
            return Plan(by_rank, kept.sizes)
        sizes = self._exchange_sizes(counts)
        if kept is not None:
            kept.sizes = sizes
        return Plan(by_rank, sizes)

    def dispatch(self, x: Tensor, routing: Routing, plan: Plan) -> Travelling:
        """(N, H) tokens -> rows under way to their experts."""
        sizes = plan.sizes.wait()
        by_rank = leading_rows(plan.by_rank, sum(sizes.sent))
        choices = torch.cat([routing.weights, routing.expert_indices.float()], dim=1)
        way, choices_way = (_Way(sizes.received, sizes.sent, self.group) for _ in range(2))
        choices = choices_way.start(gather_rows(choices, by_rank))
        rows = way.start(gather_rows(x, by_rank))
        return Travelling(rows, choices, way, choices_way, by_rank, sizes.choices)

    def receive(self, travelling: Travelling) -> Visitors:
        """-> the tokens that have experts here."""
        rows = travelling.way.finish(travelling.rows)
        weights, experts = travelling.choices_way.finish(travelling.choices).chunk(2, dim=1)
        experts = experts.detach().long() - self.own.start
        is_here = (experts >= 0) & (experts < len(self.own))
        experts = torch.where(is_here, experts, len(self.own))
        return Visitors(rows, experts, weights.contiguous(), travelling.num_choices)

    def combine(self, outputs: Tensor, travelled: Travelling) -> Tensor:
        """(M, H) sums of the experts here -> (N, H), those of all ranks; zero for tokens that went nowhere."""
        back = _Way(travelled.way.input_sizes, travelled.way.output_sizes, self.group)
        return add_rows(back.finish(back.start(outputs)), travelled.by_rank)

    def _exchange_sizes(self, counts: Tensor) -> SizesUnderWay:
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        return SizesUnderWay(torch.stack([counts[:, 0], *received.unbind(1)]))


def _sort_by_rank(expert_indices: Tensor, share: int, parts: int, valid: Tensor) -> tuple[Permutation, Tensor]:
    """(N, K) experts, `share` of them on a rank -> rows for each of `parts` ranks, and (parts, 2) int64: how many rows
    each gets, and how many choices they stand for."""
    ranks = expert_indices // share
    is_repeated = (ranks.unsqueeze(2) == ranks.unsqueeze(1)).tril(-1).any(dim=2)
    by_rank = sort_by_expert(torch.where(is_repeated, parts, ranks), parts, valid)
    is_chosen = (ranks.unsqueeze(2) == torch.arange(parts, device=ranks.device)) & valid[:, None, None]
    return by_rank, torch.stack([by_rank.tokens_per_expert, is_chosen.sum(dim=(0, 1))], dim=1)


class SizesUnderWay:
    """(3, P) on the way from the device to the host: rows to each rank, rows from each, and the choices these make."""

    def __init__(self, sizes: Tensor) -> None:
        self._event = torch.cuda.Event() if sizes.is_cuda else None
        self._sizes = sizes
        if self._event is not None:
            self._sizes = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True)
            self._sizes.copy_(sizes, non_blocking=True)
            self._event.record()

    def wait(self) -> Sizes:
        """What has arrived; until it has, nobody else's work is waited for."""
        if self._event is not None:
            self._event.synchronize()
        sent, received, choices = self._sizes.tolist()
        return Sizes(sent, received, sum(choices))


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
