"""The routed experts of one layer, their weights stacked, and the mixture layer around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe.config.model import ModelConfig
from moe.kernels.experts import expert_mlp
from moe.kernels.permute import Permutation, combine_rows, gather_rows, sort_by_expert
from moe.model.balance import RoutingStats, Tokens, alone, routing_stats
from moe.model.mlp import MLP
from moe.model.router import KeptChoice, Routing, build_router


class LocalDispatcher:
    """Brings tokens to experts and back where every expert is on this device. Dropless: no capacity, no padding."""

    def dispatch(self, x: Tensor, routing: Routing, valid: Tensor, num_experts: int) -> tuple[Tensor, Permutation]:
        """(N, H) tokens -> (N K, H) rows sorted by expert, and how to undo it."""
        permutation = sort_by_expert(routing.expert_indices, num_experts, valid)
        return gather_rows(x, permutation), permutation

    def combine(self, rows: Tensor, routing: Routing, permutation: Permutation) -> Tensor:
        """(N K, H) expert outputs -> (N, H), each token's weighted by its gate values."""
        return combine_rows(rows, routing.weights, permutation)


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
        return expert_mlp(rows, self.gate_up_proj, self.down_proj, tokens_per_expert, self.backend, zero_tail=False)


class MoE(nn.Module):
    """Equation 9 without the residual: shared experts on every token plus the chosen ones, gated."""

    def __init__(self, config: ModelConfig, num_languages: int, backend: str) -> None:
        super().__init__()
        self.config, self.num_languages = config, num_languages
        self.gate = build_router(config)
        self.dispatcher = LocalDispatcher()
        self.pool: Callable[[Tensor], Tensor] = alone
        """Sums a tensor over the data-parallel ranks, for balance losses that pool a micro-batch."""
        self.experts = GroupedExperts(config, backend)
        shared_width = config.n_shared_experts * int(config.moe_intermediate_size)
        self.shared_experts = MLP(config.hidden_size, shared_width) if shared_width else None

    def forward(self, x: Tensor, tokens: Tokens, kept: KeptChoice | None = None) -> tuple[Tensor, RoutingStats]:
        """(B, T, H) -> (B, T, H) and the layer's statistics; `kept` is given where this may be recomputed."""
        flat = x.flatten(0, 1)
        routing = self.gate(flat, tokens.input_ids.flatten(), kept)
        y = self.routed(flat, routing, tokens.valid.flatten()).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, self.statistics(routing, tokens)

    def routed(self, x: Tensor, routing: Routing, valid: Tensor) -> Tensor:
        """(N, H) -> (N, H): the gated sum of the chosen routed experts; zero where not `valid` (N,)."""
        rows, permutation = self.dispatcher.dispatch(x, routing, valid, self.config.n_routed_experts)
        rows = self.experts(rows, permutation.tokens_per_expert)
        return self.dispatcher.combine(rows, routing, permutation)

    def statistics(self, routing: Routing, tokens: Tokens) -> RoutingStats:
        return routing_stats(routing, tokens, self.num_languages, self.config, self.pool)
