"""Routers: which experts a token meets, with what weight. Arithmetic is at least float32, whatever the model computes
in.

A router takes hidden states and token ids, so that the paper's baselines (top-1, top-2, hash) are configurations of one
layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config.model import ModelConfig
from moe.kernels import has_triton


class Routing(NamedTuple):
    """The choice for N tokens."""

    expert_indices: Tensor
    """(N, K) int64, distinct in a row."""
    weights: Tensor
    """(N, K) float32: g of equation 10."""
    scores: Tensor | None
    """(N, E) float32, rows summing to 1: s of equation 11; None where nothing is learned."""
    logits: Tensor | None
    """(N, E) float32."""


class KeptChoice:
    """The experts chosen in a block's forward pass, for its recomputation in the backward pass.

    A choice made twice could differ in a tie or by a rounding, and with it every shape after it and the sizes of
    all-to-alls.
    """

    expert_indices: Tensor | None = None
    exchanged: object = None
    """What a dispatcher between ranks has exchanged beside them; its own affair."""


class TopKRouter(nn.Module):
    """Token-choice top-k (equations 10 and 11), softmax or sigmoid scores, optionally with a selection bias.

    The paper's weights are the raw scores of the chosen experts; `norm_topk_prob` renormalises them to sum to 1. The
    bias of auxiliary-loss-free balancing (arXiv 2408.15664) takes part in the choice alone, never in the weights.
    """

    expert_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.bias_update_speed = config.bias_update_speed
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias = torch.empty(config.n_routed_experts) if config.bias_update_speed > 0 else None
        self.register_buffer("expert_bias", bias)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Start with no bias."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(self, x: Tensor, token_ids: Tensor, kept: KeptChoice | None = None) -> Routing:
        """(N, H) hidden states and (N,) ids (unused here) -> Routing, by the choice that `kept` may hold already."""
        logits, log_scores = self.score(x)
        expert_indices = None if kept is None else kept.expert_indices
        if expert_indices is None:
            expert_indices = self.choose(log_scores.detach())
        if kept is not None:
            kept.expert_indices = expert_indices
        return Routing(expert_indices, *self.weigh(log_scores, expert_indices), logits)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H) -> logits and log scores, 2 x (N, E).

        In log space, renormalising needs no epsilon that a router could exploit by driving every sigmoid to zero.
        """
        logits = _product(x, self.weight)
        return logits, F.logsigmoid(logits) if self.scoring_func == "sigmoid" else logits.log_softmax(dim=-1)

    def weigh(self, log_scores: Tensor, expert_indices: Tensor) -> tuple[Tensor, Tensor]:
        """(N, E) and (N, K) -> `Routing.weights` and `Routing.scores`."""
        chosen = log_scores.gather(-1, expert_indices)
        return chosen.softmax(dim=-1) if self.norm_topk_prob else chosen.exp(), log_scores.softmax(dim=-1)

    def choose(self, log_scores: Tensor) -> Tensor:
        """(N, E) -> (N, K) experts."""
        return _top_k(log_scores if self.expert_bias is None else log_scores.exp() + self.expert_bias, self.top_k)

    @torch.no_grad()
    def update_bias(self, counts: Tensor, keep: Tensor) -> None:
        """Raise the bias of underloaded experts by one step, lower the others'.

        `counts` (E,): tokens each expert got in the whole optimizer step, over all ranks; `keep` (): 0 leaves the bias
        untouched.
        """
        assert self.expert_bias is not None
        counts = counts.float()
        direction = torch.sign(counts.mean() - counts)
        self.expert_bias += self.bias_update_speed * keep * (direction - direction.mean())


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, H) by the transpose of weight (E, H) float32 -> (N, E) in float32, or in fp64 where x is."""
    if x.dtype == torch.bfloat16 and x.is_cuda and has_triton():
        from moe.kernels.router_product import router_product  # needs Triton

        return router_product(x, weight)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))


def _top_k(preference: Tensor, k: int) -> Tensor:
    if not preference.is_cuda or preference.dtype != torch.float32 or not has_triton():
        return preference.topk(k, dim=-1, sorted=False).indices
    from moe.kernels.top_k import top_k  # needs Triton

    return top_k(preference, k)


class HashRouter(nn.Module):
    """A fixed random table from token id to K distinct experts, equally weighted (Roller et al. 2021; top-1 in the
    paper)."""

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_experts, self.top_k = config.n_routed_experts, config.num_experts_per_tok
        table = torch.empty(config.vocab_size, self.top_k, dtype=torch.int64)
        self.register_buffer("table", table, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """A random order of the ids dealt to the experts in turn, so that each serves as many ids: (vocab, K)."""
        with torch.device("cpu"):
            order = torch.randperm(len(self.table), generator=torch.Generator().manual_seed(0))
            self.table.copy_((order[:, None] + torch.arange(self.top_k)) % self.num_experts)

    def forward(self, x: Tensor, token_ids: Tensor, kept: KeptChoice | None = None) -> Routing:
        """(N, H) hidden states and (N,) ids -> Routing. Only the ids matter, and a table needs nothing `kept`."""
        expert_indices = self.table[token_ids]
        weights = torch.full(expert_indices.shape, 1 / self.top_k, device=x.device)
        return Routing(expert_indices, weights, None, None)


def build_router(config: ModelConfig) -> TopKRouter | HashRouter:
    return HashRouter(config) if config.routing == "hash" else TopKRouter(config)
