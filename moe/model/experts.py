"""The routed experts of one layer, their weights stacked, and the mixture layer around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.config.model import ModelConfig
from moe.kernels.experts import expert_mlp, routed_experts
from moe.model.balance import RoutingStats, Tokens, alone, routing_stats
from moe.model.mlp import MLP
from moe.model.router import KeptChoice, Routing, build_router


class Dispatcher(Protocol):
    """Brings tokens to experts that ranks share out, and back. Dropless: no capacity, no padding.

    Between `dispatch` and `receive` rows may be under way from rank to rank, and other work can be done.
    """

    def dispatch(self, x: Tensor, routing: Routing, valid: Tensor, kept: KeptChoice | None) -> Any:
        """(N, H) tokens -> what the two other methods need; those that are not `valid` (N,) stay at home."""
        ...

    def receive(self, sent: Any) -> tuple[Tensor, Tensor]:
        """-> (R, H) rows sorted by the experts on this device, and how many each has."""
        ...

    def combine(self, rows: Tensor, routing: Routing, sent: Any) -> Tensor:
        """(R, H) expert outputs -> (N, H), each token's weighted by its gate values; zero where not valid."""
        ...


class GroupedExperts(nn.Module):
    """E SwiGLU experts; all of them in three grouped GEMMs.

    Gate and up are stacked on a dimension of their own, so that a shard along the width I never mixes them.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, int(config.moe_intermediate_size), config.hidden_size
        self.backend = backend
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2, width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """(N, H) rows sorted by expert, (E,) group sizes -> (N, H)."""
        gate_up_proj, down_proj = local(self.gate_up_proj), local(self.down_proj)
        if not len(gate_up_proj):
            return rows.clone()  # none come to a rank that was left without an expert
        return expert_mlp(rows, gate_up_proj, down_proj, tokens_per_expert, self.backend, zero_tail=False)

    def route(self, x: Tensor, routing: Routing, valid: Tensor) -> Tensor:
        """(N, H) tokens, all of whose experts are here -> (N, H), the gated sum; zero where not `valid` (N,)."""
        weights = local(self.gate_up_proj), local(self.down_proj)
        return routed_experts(x, routing.expert_indices, routing.weights, *weights, self.backend, valid)


class MoE(nn.Module):
    """Equation 9: the residual stream plus the shared experts on every token plus the chosen ones, gated."""

    def __init__(self, config: ModelConfig, num_languages: int, backend: str) -> None:
        super().__init__()
        self.config, self.num_languages = config, num_languages
        self.gate = build_router(config)
        self.dispatcher: Dispatcher | None = None
        """None where every expert is on this device."""
        self.pool: Callable[[Tensor], Tensor] = alone
        """Sums a tensor over the ranks that see other parts of the same sequence or pool, for balance losses."""
        self.experts = GroupedExperts(config, backend)
        shared_width = config.n_shared_experts * int(config.moe_intermediate_size)
        self.shared_experts = MLP(config.hidden_size, shared_width) if shared_width else None

    def forward(
        self, x: Tensor, residual: Tensor, tokens: Tokens, kept: KeptChoice | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """(B, T, H) hidden states and the residual stream -> the stream behind this layer, and the layer's statistics;
        `kept` is given where this may be recomputed."""
        flat, valid = x.flatten(0, 1), tokens.valid.flatten()
        routing = self.gate(flat, tokens.input_ids.flatten(), kept)
        if self.dispatcher is None:
            y = self.mix(x, residual, routing, valid)
        else:
            sent = self.dispatcher.dispatch(flat, routing, valid, kept)
            shared = self.shared(x)  # while the rows travel
            routed = self.dispatcher.combine(self.experts(*self.dispatcher.receive(sent)), routing, sent)
            y = residual + _sum(routed.view_as(x), shared)
        return y, self.statistics(routing, tokens)

    def mix(self, x: Tensor, residual: Tensor, routing: Routing, valid: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H), all experts here; tokens that are not `valid` (B T,) meet the shared ones alone.

        One function without data-dependent shapes, so that it compiles as a whole.
        """
        routed = self.experts.route(x.flatten(0, 1), routing, valid).view_as(x)
        return residual + _sum(routed, self.shared(x))

    def shared(self, x: Tensor) -> Tensor | None:
        """The shared experts' output, where there are any."""
        return None if self.shared_experts is None else self.shared_experts(x)

    def statistics(self, routing: Routing, tokens: Tokens) -> RoutingStats:
        return routing_stats(routing, tokens, self.num_languages, self.config, self.pool)


def _sum(routed: Tensor, shared: Tensor | None) -> Tensor:
    return routed if shared is None else routed + shared


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
