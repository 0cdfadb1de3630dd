r"""Balance losses of section 3.3, from sums that add up over shards of the tokens.

With N' routed experts, K' of them active, over the T tokens of a sequence:

    f_i = N' / (K' T) * #{tokens that select i}        P_i = 1/T * sum of s_{i,t}
    L_ExpBal = alpha_1 * sum_i f_i P_i                                              (equations 12-14)
    L_DevBal = alpha_2 * sum_d f'_d P'_d,   f'_d = mean of f_i, P'_d = sum of P_i over the experts of group d   (15-17)

Both equal their alpha under uniform routing. Every loss here comes back as a sum over tokens, a sequence of n tokens
counting n times, so that the trainer divides it by the same global token count as the cross-entropy: the gradient then
does not depend on how the step was cut into micro-batches and ranks. f carries no gradient; P does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.config.model import ModelConfig
from moe.model.router import Routing


class Tokens(NamedTuple):
    """What the model knows of its input beside the hidden states; all (B, T)."""

    input_ids: Tensor
    languages: Tensor
    """Index of the token's language."""
    valid: Tensor
    """False at padding, which is neither routed nor counted."""


class RoutingStats(NamedTuple):
    """What one layer reports of one micro-batch. Losses carry their alpha, are summed over tokens and alone have
    gradients."""

    expert_balance: Tensor
    device_balance: Tensor
    z_loss: Tensor
    counts: Tensor
    """(languages, E) int64: tokens of each language that each expert got."""
    entropy: Tensor
    """Sum over tokens of the entropy of s, in nats."""


class RoutingSums(NamedTuple):
    """Statistics of B sequences, or of the parts of them that this rank has."""

    counts: Tensor
    """(B, languages, E) int64."""
    scores: Tensor
    """(B, E) float32: sum of s over a sequence's tokens."""
    tokens: Tensor
    """(B,) float32: valid tokens."""


def routing_sums(routing: Routing, tokens: Tokens, num_languages: int, num_experts: int) -> RoutingSums:
    """Count choices and sum scores of (B T, ...) routing by sequence; padding contributes nothing."""
    batch, length = tokens.valid.shape
    bins = torch.arange(batch, device=tokens.valid.device)[:, None] * num_languages + tokens.languages
    bins = bins.view(-1, 1) * num_experts + routing.expert_indices  # (B T, K) in [0, B languages E)
    ones = tokens.valid.view(-1, 1).expand_as(bins).long()
    counts = torch.zeros(batch * num_languages * num_experts, dtype=torch.int64, device=bins.device)
    counts = counts.scatter_add(0, bins.flatten(), ones.flatten()).view(batch, num_languages, num_experts)
    if routing.scores is None:
        scores = torch.zeros(batch, num_experts, device=bins.device)
    else:
        scores = (routing.scores.view(batch, length, num_experts) * tokens.valid[..., None]).sum(dim=1)
    return RoutingSums(counts, scores, tokens.valid.sum(dim=1).float())


def alone(tensor: Tensor) -> Tensor:
    """The pooling of a single rank."""
    return tensor


def balance_losses(
    sums: RoutingSums, config: ModelConfig, pool: Callable[[Tensor], Tensor] = alone
) -> tuple[Tensor, Tensor]:
    """Expert-level and device-level loss, each summed over this rank's tokens.

    Per sequence (`seq_aux`), or with all sequences of one micro-batch pooled into one over all data-parallel ranks. The
    pooled form depends on how a step is cut into micro-batches; the other does not. `pool` sums over the ranks that
    have further tokens of the same sequence or pool.
    """
    counts, scores, tokens = sums.counts.sum(dim=1).to(sums.scores.dtype), sums.scores, sums.tokens
    if not config.seq_aux:
        counts, scores, tokens = (tensor.sum(0, keepdim=True) for tensor in (counts, scores, tokens))
    counts, tokens = pool(counts), pool(tokens)
    ratio = config.n_routed_experts / config.num_experts_per_tok
    f = ratio * counts / tokens.clamp(min=1)[:, None]  # (B, E)
    # n P_i is the plain sum of scores: weighting a sequence by its n tokens cancels P's division
    expert_balance = config.aux_loss_alpha * (f * scores).sum()
    f_device, score_device = _by_device(f, scores, config.n_device_groups)
    device_balance = config.device_aux_loss_alpha * (f_device * score_device).sum()
    return expert_balance, device_balance


def _by_device(f: Tensor, scores: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(B, E) -> 2 x (B, D): mean of f and sum of the scores over each group of consecutive experts."""
    members = device_groups(f.shape[1], groups, f.device).to(f.dtype)  # (E, D)
    return f @ (members / members.sum(dim=0)), scores @ members


def device_groups(num_experts: int, groups: int, device: torch.device) -> Tensor:
    """(E, D) 0 or 1: membership of D consecutive groups.

    Their sizes differ by at most one, larger ones first (63 over 4: 16, 16, 16, 15).
    """
    small, larger = divmod(num_experts, groups)
    expert = torch.arange(num_experts, device=device)
    boundary = larger * (small + 1)
    group = torch.where(expert < boundary, expert // (small + 1), larger + (expert - boundary) // max(small, 1))
    return torch.nn.functional.one_hot(group, groups)


def routing_stats(
    routing: Routing,
    tokens: Tokens,
    num_languages: int,
    config: ModelConfig,
    pool: Callable[[Tensor], Tensor] = alone,
) -> RoutingStats:
    """Losses and telemetry of one layer for one micro-batch."""
    sums = routing_sums(routing, tokens, num_languages, config.n_routed_experts)
    counts = sums.counts.sum(dim=0)
    if routing.scores is None or routing.logits is None:
        zero = torch.zeros((), device=counts.device)
        return RoutingStats(zero, zero, zero, counts, zero)
    expert_balance, device_balance = balance_losses(sums, config, pool)
    valid = tokens.valid.flatten()
    z_loss = config.router_z_loss_alpha * (routing.logits.logsumexp(dim=-1).square() * valid).sum()
    entropy = torch.special.entr(routing.scores.detach()).sum(dim=-1)
    return RoutingStats(expert_balance, device_balance, z_loss, counts, (entropy * valid).sum())
