from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from balance_oracle import token_sums
from model_helpers import random_ids, small_config, unit_variance_model
from torch import Tensor

from moe.config import ModelConfig
from moe.model.balance import (
    RoutingStats,
    RoutingSums,
    Tokens,
    balance_losses,
    device_groups,
    routing_stats,
    routing_sums,
)
from moe.model.router import Routing, TopKRouter

EXPERTS, ACTIVE, BATCH, LENGTH = 11, 3, 4, 10
ALPHAS = {"aux_loss_alpha": 0.3, "device_aux_loss_alpha": 0.7, "router_z_loss_alpha": 0.2}


def config_of(**changes: Any) -> ModelConfig:
    return small_config(n_routed_experts=EXPERTS, num_experts_per_tok=ACTIVE, **(ALPHAS | changes))


def tokens_of(padded: bool, num_languages: int = 1) -> Tokens:
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if padded:
        valid[1, 7:], valid[2, 1:], valid[3] = False, False, False
    languages = torch.arange(LENGTH).expand(BATCH, -1) % num_languages
    return Tokens(torch.zeros(BATCH, LENGTH, dtype=torch.int64), languages, valid)


def hidden_states(config: ModelConfig, skew: float) -> Tensor:
    """(B T, H): tokens of one sequence resemble each other the more, the larger `skew`."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(BATCH, LENGTH, config.hidden_size, generator=generator, dtype=torch.float64)
    common = torch.randn(BATCH, 1, config.hidden_size, generator=generator, dtype=torch.float64)
    return (own + skew * common).flatten(0, 1)


def router_of(config: ModelConfig) -> TopKRouter:
    router = TopKRouter(config).double()
    torch.nn.init.normal_(router.weight, 0.0, 0.3, generator=torch.Generator().manual_seed(4))
    return router


def uniform_routing(tokens: Tokens) -> Routing:
    """Every expert has equal scores, and over a sequence of E tokens is chosen equally often."""
    steps = torch.arange(tokens.valid.numel())
    indices = (steps[:, None] + torch.arange(ACTIVE)) % EXPERTS
    scores = torch.full((len(steps), EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    return Routing(indices, scores.gather(1, indices), scores, torch.zeros_like(scores))


def oracle(routing: Routing, tokens: Tokens, config: ModelConfig) -> tuple[Tensor, Tensor]:
    assert routing.scores is not None
    return token_sums(
        routing.scores.view(BATCH, LENGTH, -1),
        routing.expert_indices.view(BATCH, LENGTH, -1),
        tokens.valid,
        (config.aux_loss_alpha, config.device_aux_loss_alpha),
        config.n_device_groups,
        config.seq_aux,
    )


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("skew", "groups", "seq_aux"), [(s, d, a) for s, d, a in product([0.0, 3.0], [1, 2, 4, 5], [True, False])]
)
def test_losses_and_router_gradients_equal_the_oracle(
    skew: float, groups: int, seq_aux: bool, padded: bool, scoring: str
) -> None:
    config = config_of(n_device_groups=groups, seq_aux=seq_aux, scoring_func=scoring)
    router, tokens = router_of(config), tokens_of(padded)
    routing = router(hidden_states(config, skew), tokens.input_ids.flatten())
    stats = routing_stats(routing, tokens, 1, config)
    for found, expected in zip(
        (stats.expert_balance, stats.device_balance), oracle(routing, tokens, config), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(loss, router.weight, retain_graph=True)[0] for loss in (found, expected)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
        if groups > 1 or found is stats.expert_balance:
            assert gradients[0].abs().max() > 1e-4


@pytest.mark.parametrize("groups", [1, 2, 4, 5, 11])
def test_uniform_routing_costs_exactly_alpha_a_token(groups: int) -> None:
    config = config_of(n_device_groups=groups)
    valid = torch.ones(BATCH, EXPERTS, dtype=torch.bool)
    tokens = Tokens(torch.zeros_like(valid, dtype=torch.int64), torch.zeros_like(valid, dtype=torch.int64), valid)
    stats = routing_stats(uniform_routing(tokens), tokens, 1, config)
    assert stats.expert_balance.item() / valid.sum().item() == pytest.approx(0.3, rel=1e-14)
    assert stats.device_balance.item() / valid.sum().item() == pytest.approx(0.7, rel=1e-14)


def test_skewed_routing_costs_more_than_alpha() -> None:
    config = config_of(n_device_groups=4)
    tokens = tokens_of(padded=False)
    stats = routing_stats(router_of(config)(hidden_states(config, 3.0), tokens.input_ids.flatten()), tokens, 1, config)
    assert stats.expert_balance / (BATCH * LENGTH) > 1.2 * 0.3
    assert stats.device_balance / (BATCH * LENGTH) > 1.1 * 0.7


@pytest.mark.parametrize(("experts", "groups"), [(63, 4), (63, 8), (64, 4), (128, 4), (11, 5), (5, 5), (7, 1)])
def test_device_groups_are_consecutive_and_even(experts: int, groups: int) -> None:
    members = device_groups(experts, groups, torch.device("cpu"))
    assert members.sum(dim=1).tolist() == [1] * experts
    sizes = members.sum(dim=0).tolist()
    assert max(sizes) - min(sizes) <= 1
    assert members.argmax(dim=1).tolist() == [d for d, size in enumerate(sizes) for _ in range(size)]
    assert sizes == sorted(sizes, reverse=True)


def part(values: Any, rows: slice, columns: slice = slice(None)) -> Tensor:
    return values[rows, columns].contiguous()


def stats_of(router: TopKRouter, x: Tensor, tokens: Tokens, config: ModelConfig) -> RoutingStats:
    return routing_stats(router(x, tokens.input_ids.flatten()), tokens, 1, config)


def accumulated_gradient(config: ModelConfig, sizes: list[int]) -> Tensor:
    """The router's gradient of all balance terms over micro-batches of these sizes, normalised as the trainer does."""
    router, tokens = router_of(config), tokens_of(padded=True)
    x = hidden_states(config, 2.0).view(BATCH, LENGTH, -1)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        stats = stats_of(router, x[rows].flatten(0, 1), Tokens(*(part(t, rows) for t in tokens)), config)
        ((stats.expert_balance + stats.device_balance + stats.z_loss) / tokens.valid.sum()).backward()
        start += size
    assert router.weight.grad is not None
    return router.weight.grad


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [3, 1]], ids=str)
def test_sequence_wise_gradients_do_not_depend_on_micro_batches(sizes: list[int]) -> None:
    config = config_of(n_device_groups=4)
    torch.testing.assert_close(
        accumulated_gradient(config, sizes), accumulated_gradient(config, [4]), rtol=0, atol=1e-15
    )


def test_batch_wise_gradients_do_as_documented() -> None:
    config = config_of(n_device_groups=4, seq_aux=False)
    difference = accumulated_gradient(config, [2, 2]) - accumulated_gradient(config, [4])
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("seq_aux", [True, False])
def test_sums_add_up_over_shards_of_the_sequence(seq_aux: bool) -> None:
    """As on two tensor-parallel ranks: each counts its part of every sequence, the sums are added, then the loss."""
    config = config_of(n_device_groups=4, seq_aux=seq_aux)
    router, tokens = router_of(config), tokens_of(padded=True, num_languages=3)
    x = hidden_states(config, 2.0).view(BATCH, LENGTH, -1)
    shards = []
    for columns in (slice(0, 4), slice(4, LENGTH)):
        shard = Tokens(*(part(t, slice(None), columns) for t in tokens))
        routing = router(x[:, columns].flatten(0, 1), shard.input_ids.flatten())
        shards.append(routing_sums(routing, shard, 3, EXPERTS))
    added = RoutingSums(*(a + b for a, b in zip(*shards, strict=True)))
    whole = routing_sums(router(x.flatten(0, 1), tokens.input_ids.flatten()), tokens, 3, EXPERTS)
    assert torch.equal(added.counts, whole.counts)
    assert torch.equal(added.tokens, whole.tokens)
    for found, expected in zip(balance_losses(added, config), balance_losses(whole, config), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_released_codes_sequence_loss_is_ours() -> None:
    """Counts over (T K / N) times mean scores, summed over experts, then the mean over sequences."""
    config = config_of()
    tokens = tokens_of(padded=False)
    routing = router_of(config)(hidden_states(config, 2.0), tokens.input_ids.flatten())
    assert routing.scores is not None
    counts = torch.stack([row.bincount(minlength=EXPERTS) for row in routing.expert_indices.view(BATCH, -1)])
    load = counts / (LENGTH * ACTIVE / EXPERTS)
    released = config.aux_loss_alpha * (load * routing.scores.view(BATCH, LENGTH, -1).mean(dim=1)).sum(dim=1).mean()
    found = routing_stats(routing, tokens, 1, config).expert_balance / (BATCH * LENGTH)
    torch.testing.assert_close(found, released, rtol=1e-6, atol=0)


def test_z_loss_equals_its_oracle() -> None:
    config = config_of()
    tokens = tokens_of(padded=True)
    routing = router_of(config)(hidden_states(config, 1.0), tokens.input_ids.flatten())
    assert routing.logits is not None
    rows = [row for row, valid in zip(routing.logits.tolist(), tokens.valid.flatten().tolist(), strict=True) if valid]
    expected = 0.2 * sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in rows)
    assert routing_stats(routing, tokens, 1, config).z_loss.item() == pytest.approx(expected, rel=1e-12)


def test_counts_and_entropy_by_hand() -> None:
    config = config_of()
    tokens = tokens_of(padded=True, num_languages=2)
    routing = router_of(config)(hidden_states(config, 1.0), tokens.input_ids.flatten())
    assert routing.scores is not None
    counts = [[0] * EXPERTS for _ in range(2)]
    entropy = 0.0
    for n, (b, t) in enumerate(product(range(BATCH), range(LENGTH))):
        if not tokens.valid[b, t]:
            continue
        entropy -= sum(s * math.log(s) for s in routing.scores[n].tolist())
        for expert in routing.expert_indices[n].tolist():
            counts[int(tokens.languages[b, t])][expert] += 1
    stats = routing_stats(routing, tokens, 2, config)
    assert stats.counts.tolist() == counts
    assert stats.entropy.item() == pytest.approx(entropy, rel=1e-12)


def test_what_padding_holds_does_not_matter() -> None:
    config = config_of(n_device_groups=4)
    tokens = tokens_of(padded=True)
    router, x = router_of(config), hidden_states(config, 1.0)
    garbage = torch.where(tokens.valid.flatten()[:, None], x, 1e3 * x.flip(0))
    for found, expected in zip(
        stats_of(router, garbage, tokens, config), stats_of(router, x, tokens, config), strict=True
    ):
        assert torch.equal(found, expected)


def test_the_models_balance_terms_reach_its_routers() -> None:
    config = config_of(n_device_groups=4)
    model = unit_variance_model(config)
    for stats in model(random_ids(config, 2, 8)).routing:
        (stats.expert_balance + stats.device_balance + stats.z_loss).backward(retain_graph=True)
    for block in model.moe_blocks():
        assert isinstance(block.gate, TopKRouter)
        assert block.gate.weight.grad is not None
        assert block.gate.weight.grad.abs().max() > 0
    # a balance term acts on what lies before its router, and on nothing after it
    assert model.moe_blocks()[-1].experts.down_proj.grad is None
