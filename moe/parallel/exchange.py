"""Expert parallelism: the dispatcher that brings tokens to experts on other ranks and their outputs back.

    (N, H) --a row for every rank with experts of the token--> (S, H) --all-to-all--> (M, H) tokens
    tokens --the experts here, weighted and summed--> (M, H) --all-to-all--> (S, H) --summed--> (N, H)

A token travels once to a rank, however many of its experts live there, and one sum of their outputs comes back; its
gate values go with it, and the rows that its choices take among those of their experts. Dropless: what a rank receives
depends on the routing alone, from nothing to everything. Counts are exchanged first, and sizes copied to the host once;
that is the only time a dispatch waits for the device, so little is left to launch after it: what will be sent is copied
meanwhile. Rows travel while the shared experts work, forward and backward: `dispatch` and `send_back` start an exchange
that `receive` and `combine` wait for, and in the backward pass these start their gradients' way, and those wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.permute import Permutation, add_rows, leading_rows, sort_by_expert, sum_of_rows
from moe.model.experts import Visitors
from moe.model.router import KeptChoice, Routing
from moe.parallel.layout import expert_share

# its name from torch 2.13 on; the functional form would be taken for tensor parallelism's by `moe.model.recompute`
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class Sizes:
    """How much one dispatch exchanges."""

    sent: list[int]
    """Tokens to each rank."""
    received: list[int]
    """Tokens from each rank."""
    rows: int
    """R, the received tokens' choices of experts of this rank."""
    before: int
    """All ranks' choices of experts of lower ranks, whose rows come first."""


class Plan(NamedTuple):
    """Where the tokens of a dispatch go."""

    by_rank: Permutation
    """Of this rank's N K slots, by rank; a token's first choice on a rank stands for the others there."""
    places: Tensor
    """(N, K) int32: the row that each choice takes among all ranks' choices, sorted by expert, then by rank."""
    bounds: Tensor
    """(own experts + 1,) int32: as `Permutation.bounds`, of the rows here."""
    sizes: SizesUnderWay


@dataclass(frozen=True)
class Travelling:
    """Rows on their way to their experts, and all that is needed to bring the outputs back."""

    rows: Tensor
    """(M, H), undefined until received."""
    gates: Tensor
    """(M, 2 K) float32, likewise: gate values, and places as their bits."""
    way: _Way
    gates_way: _Way
    by_rank: Permutation
    """Of the S sent rows."""
    bounds: Tensor
    """As in `Plan`."""
    sizes: Sizes


class Returning(NamedTuple):
    """Outputs on their way from their experts."""

    outputs: Tensor
    """(S, H), undefined until combined."""
    way: _Way
    by_rank: Permutation
    """As in `Travelling`."""


class ExchangeDispatcher:
    """The dispatcher (see `moe.model.experts.Dispatcher`) of experts that the ranks of `group` share out.

    Args:
        num_experts: of the layer, E; each rank holds a consecutive run of them (`expert_share`).
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts, self.group = num_experts, group
        self.parts, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.per_rank = len(expert_share(num_experts, self.parts, 0))
        self.own = expert_share(num_experts, self.parts, self.rank)

    def compile(self) -> None:
        """Have what surrounds the exchanges compiled, arrivals once for all numbers of them."""
        self._sort = torch.compile(self._sort)  # type: ignore[method-assign]
        self._place = torch.compile(self._place)  # type: ignore[method-assign]
        self._arrange = torch.compile(self._arrange, dynamic=True)  # type: ignore[method-assign]

    def plan(self, routing: Routing, valid: Tensor, kept: KeptChoice | None) -> Plan:
        """Sort the choices by expert and the tokens by rank, and send the sizes to the host; a recomputation finds kept
        what had to be exchanged for it."""
        by_expert, by_rank, own_counts = self._sort(routing.expert_indices, valid)
        known = kept.exchanged if kept is not None and isinstance(kept.exchanged, tuple) else None
        counts = known[0] if known else self._gather(own_counts)
        places, bounds, needed = self._place(routing.expert_indices, by_expert, counts)
        sizes = known[1] if known else SizesUnderWay(needed)
        if kept is not None:
            kept.exchanged = counts, sizes
        return Plan(by_rank, places, bounds, sizes)

    def dispatch(self, x: Tensor, routing: Routing, plan: Plan) -> Travelling:
        """(N, H) tokens -> rows under way to their experts."""
        assert routing.weights.dtype == torch.float32  # beside which the places' bits stay what they are
        gates = torch.cat([routing.weights, plan.places.view(torch.float32)], dim=1)
        copies, gate_copies = self._copy(x, plan.by_rank), self._copy(gates, plan.by_rank)
        sizes = plan.sizes.wait()
        by_rank = leading_rows(plan.by_rank, sum(sizes.sent))
        way = _Way(sizes.received, sizes.sent, self.group)
        gates_way = _Way(sizes.received, sizes.sent, self.group)
        rows, gates = way.send(x, copies, by_rank), gates_way.send(gates, gate_copies, by_rank)
        return Travelling(rows, gates, way, gates_way, by_rank, plan.bounds, sizes)

    def receive(self, travelling: Travelling) -> Visitors:
        """-> the tokens that have experts here, and the rows of these."""
        x = travelling.way.finish(travelling.rows)
        weights, places = travelling.gates_way.finish(travelling.gates).chunk(2, dim=1)
        sizes = travelling.sizes
        rows = self._arrange(places.detach().view(torch.int32), sizes.before, sizes.rows)
        return Visitors(x, weights.contiguous(), Permutation(*rows, travelling.bounds, None))

    def send_back(self, outputs: Tensor, travelled: Travelling) -> Returning:
        """(M, H) sums of the experts here -> under way to where the tokens came from."""
        way = _Way(travelled.way.input_sizes, travelled.way.output_sizes, self.group)
        return Returning(way.start(outputs), way, travelled.by_rank)

    def combine(self, returning: Returning) -> Tensor:
        """-> (N, H), the sums of all ranks' experts; zero for tokens that went nowhere."""
        return add_rows(returning.way.finish(returning.outputs), returning.by_rank)

    @torch.no_grad()
    def _copy(self, per_token: Tensor, by_rank: Permutation) -> Tensor:
        """(N, ...) -> (N min(K, P), ...) in the order of sending: as many as could be sent, so that the device copies
        them while the host still waits to hear how many are."""
        tokens, top_k = by_rank.row_of_slot.shape
        return per_token.index_select(0, by_rank.token_of_row[: tokens * min(top_k, self.parts)])

    def _sort(self, expert_indices: Tensor, valid: Tensor) -> tuple[Permutation, Permutation, Tensor]:
        """(N, K) experts -> their slots by expert and by rank, and how many tokens each of either gets, (E + P,)."""
        ranks = expert_indices // self.per_rank
        is_repeated = (ranks.unsqueeze(2) == ranks.unsqueeze(1)).tril(-1).any(dim=2)
        by_expert = sort_by_expert(expert_indices, self.num_experts, valid)
        by_rank = sort_by_expert(torch.where(is_repeated, self.parts, ranks), self.parts, valid)
        return by_expert, by_rank, torch.cat([by_expert.tokens_per_expert, by_rank.tokens_per_expert])

    def _gather(self, counts: Tensor) -> Tensor:
        """(E + P,) -> (P, E + P)."""
        gathered = counts.new_empty(self.parts * len(counts))
        _all_gather(gathered, counts, group=self.group)
        return gathered.view(self.parts, -1)

    def _place(self, expert_indices: Tensor, by_expert: Permutation, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> `Plan.places`, `Plan.bounds` and sizes (2 P + 2,): sent, received, rows and before."""
        loads, tokens = counts.split([self.num_experts, self.parts], dim=1)
        total, mine = loads.sum(dim=0), loads[self.rank]
        begin = total.cumsum(0) - total
        # a choice's row moves from among this rank's to behind those of lower ranks, among all
        shift = begin + loads[: self.rank].sum(dim=0) - (mine.cumsum(0) - mine)
        places = (by_expert.row_of_slot + shift[expert_indices]).int()
        bounds = F.pad(total[self.own.start : self.own.stop].cumsum(0, dtype=torch.int32), (1, 0))
        ends = torch.stack([bounds[-1].long(), total[: self.own.start].sum()])
        return places, bounds, torch.cat([tokens[self.rank], tokens[:, self.rank], ends])

    def _arrange(self, places: Tensor, before: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """(M, K) places among all ranks' choices -> the first three of the `Permutation` of the `end` rows here."""
        rows = places.long() - before
        # of experts elsewhere: no row, and none reads the last slot
        rows = torch.where((rows < 0) | (rows >= end), end, rows)
        slots = torch.arange(rows.numel(), device=rows.device)
        slot_of_row = torch.empty(end + 1, dtype=torch.int64, device=rows.device).scatter_(0, rows.flatten(), slots)
        slot_of_row = slot_of_row[:-1]
        return slot_of_row, (slot_of_row // places.shape[1]).to(torch.int32), rows


class SizesUnderWay:
    """`Sizes` in one tensor, on its way from the device to the host."""

    def __init__(self, sizes: Tensor) -> None:
        self._event = torch.cuda.Event() if sizes.is_cuda else None
        self._sizes = sizes
        if self._event is not None:
            self._sizes = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True)
            self._sizes.copy_(sizes, non_blocking=True)
            self._event.record()

    def wait(self) -> Sizes:
        """What has arrived; work that was launched later is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        *tokens, rows, before = self._sizes.tolist()
        return Sizes(tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :], rows, before)


class _Way:
    """An all-to-all in two halves, so that other work can be done between them, forward and backward."""

    def __init__(self, output_sizes: list[int], input_sizes: list[int], group: dist.ProcessGroup) -> None:
        self.output_sizes, self.input_sizes, self.group = output_sizes, input_sizes, group
        self.gradient: Tensor | None = None
        """On the way back; autograd would not carry it from half to half, as its shape is not that of the rows."""

    def send(self, per_token: Tensor, copies: Tensor, by_rank: Permutation) -> Tensor:
        """`start` of the copies of `per_token` (N, ...), the first of `copies`, as one operation for autograd."""
        return _Send.apply(per_token, copies, by_rank.row_of_slot, self)

    def start(self, rows: Tensor) -> Tensor:
        """The result may be looked at after `finish` only."""
        return _Start.apply(rows, self)

    def wait_for_gradient(self) -> Tensor:
        """Of what was sent."""
        gradient, self.gradient = self.gradient, None
        return torch.ops._c10d_functional.wait_tensor(gradient)

    def finish(self, rows: Tensor) -> Tensor:
        return _Finish.apply(rows, self)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, per_token: Tensor, copies: Tensor, row_of_slot: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(row_of_slot)
        return _exchange(copies[: sum(way.input_sizes)], way.output_sizes, way.input_sizes, way.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        return sum_of_rows(ctx.way.wait_for_gradient(), row_of_slot), None, None, None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return _exchange(rows, way.output_sizes, way.input_sizes, way.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.way.wait_for_gradient(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return torch.ops._c10d_functional.wait_tensor(rows).view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.way.gradient = _exchange(grad, ctx.way.input_sizes, ctx.way.output_sizes, ctx.way.group)
        return grad, None  # for its shape; `_Start` and `_Send` take the other


def _exchange(rows: Tensor, output_sizes: list[int], input_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    # the functional form is an operator, which activation checkpointing can keep
    return torch.ops._c10d_functional.all_to_all_single(rows.contiguous(), output_sizes, input_sizes, group.group_name)
