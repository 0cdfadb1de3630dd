"""The routed experts of one layer, their weights stacked, and the mixture layer around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe.config.model import ModelConfig
from moe.kernels.experts import permuted_experts, routed_experts
from moe.kernels.permute import Permutation
from moe.model.balance import RoutingStats, Tokens, alone, routing_stats
from moe.model.mlp import MLP
from moe.model.router import KeptChoice, Routing, build_router


class Visitors(NamedTuple):
    """Tokens that have experts on this device, wherever they come from."""

    x: Tensor
    """(M, H)."""
    weights: Tensor
    """(M, K) float32 gate values."""
    permutation: Permutation
    """Rows of the choices that fell on experts here."""


class Dispatcher(Protocol):
    """Brings tokens to experts that ranks share out, and back. Dropless: no capacity, no padding.

    Tokens may be under way from rank to rank between `dispatch` and `receive`, and their experts' outputs between
    `send_back` and `combine`; other work can be done meanwhile.
    """

    def plan(self, routing: Routing, valid: Tensor, kept: KeptChoice | None) -> Any:
        """Where each token goes; those that are not `valid` (N,) stay at home."""
        ...

    def dispatch(self, x: Tensor, routing: Routing, plan: Any) -> Any:
        """(N, H) tokens -> what the other methods need."""
        ...

    def receive(self, sent: Any) -> Visitors: ...

    def send_back(self, outputs: Tensor, sent: Any) -> Any:
        """(M, H) gated sums of the experts on this device -> what `combine` needs."""
        ...

    def combine(self, returning: Any) -> Tensor:
        """-> (N, H), the gated sums of all experts; zero where not valid."""
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
        self.gradient_sums: tuple[Tensor, Tensor] | None = None
        """Float32 sums of gate_up_proj's and down_proj's gradients, this rank's part, where fused experts are to add a
        backward pass's to those of passes before it; the parameters then get none. One forward pass at a time: its
        backward pass must come before the next."""

    def forward(self, x: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        """`Visitors` -> (M, H), the gated sum of the experts here."""
        gate_up_proj, down_proj = local(self.gate_up_proj), local(self.down_proj)
        if not len(gate_up_proj):  # no token comes to a rank that was left without an expert, but it takes part
            nothing = x * weights.sum(dim=1, keepdim=True).to(x.dtype)
            needs_grad = torch.is_grad_enabled() and gate_up_proj.requires_grad
            return nothing.requires_grad_() if needs_grad and not nothing.requires_grad else nothing
        return permuted_experts(x, weights, permutation, gate_up_proj, down_proj, self.backend, self.gradient_sums)

    def route(self, x: Tensor, routing: Routing, valid: Tensor) -> Tensor:
        """(N, H) tokens, all of whose experts are here -> (N, H), the gated sum; zero where not `valid` (N,)."""
        weights = local(self.gate_up_proj), local(self.down_proj)
        return routed_experts(
            x, routing.expert_indices, routing.weights, *weights, self.backend, valid, self.gradient_sums
        )


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
        routing = self.gate(x.flatten(0, 1), tokens.input_ids.flatten(), kept)
        if self.dispatcher is not None:
            return self.mix_apart(self.dispatcher, x, residual, routing, tokens, kept)
        return self.mix(x, residual, routing, tokens.valid.flatten()), self.statistics(routing, tokens)

    def mix(self, x: Tensor, residual: Tensor, routing: Routing, valid: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H), all experts here; tokens that are not `valid` (B T,) meet the shared ones alone.

        One function without data-dependent shapes, so that it compiles as a whole.
        """
        routed = self.experts.route(x.flatten(0, 1), routing, valid)
        return self.join(residual, routed, self.shared_experts(x) if self.shared_experts else None)

    def mix_apart(
        self,
        dispatcher: Dispatcher,
        x: Tensor,
        residual: Tensor,
        routing: Routing,
        tokens: Tokens,
        kept: KeptChoice | None,
    ) -> tuple[Tensor, RoutingStats]:
        """The same with experts on other ranks as well, and the statistics.

        The first half of the shared experts' work hides the tokens' way to the routed ones, the second the outputs' way
        back, and so it is with gradients: backward, what is called later goes first.
        """
        plan = dispatcher.plan(routing, tokens.valid.flatten(), kept)
        sent = dispatcher.dispatch(x.flatten(0, 1), routing, plan)
        gate_up = self.shared_experts.gate_up(x) if self.shared_experts else None
        outputs = self.experts(*dispatcher.receive(sent))
        returning = dispatcher.send_back(outputs, sent)
        shared = self.shared_experts.down(*gate_up) if self.shared_experts and gate_up else None
        statistics = self.statistics(routing, tokens)
        return self.join(residual, dispatcher.combine(returning), shared), statistics

    def join(self, residual: Tensor, routed: Tensor, shared: Tensor | None) -> Tensor:
        """The residual stream (B, T, H) with what the routed (N, H) and the shared experts (B, T, H) add."""
        routed = routed.view_as(residual)
        return residual + (routed if shared is None else routed + shared)

    def statistics(self, routing: Routing, tokens: Tokens) -> RoutingStats:
        return routing_stats(routing, tokens, self.num_languages, self.config, self.pool)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
