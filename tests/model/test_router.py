from __future__ import annotations

import pytest
import torch
from model_helpers import random_ids, small_config, unit_variance_model
from torch import Tensor

from moe.config import ModelConfig
from moe.model.router import HashRouter, Routing, TopKRouter, build_router

TOKENS = 40
NO_IDS = torch.zeros(TOKENS, dtype=torch.int64)


def router_of(config: ModelConfig) -> TopKRouter:
    router = TopKRouter(config)
    torch.nn.init.normal_(router.weight, 0.0, 0.3, generator=torch.Generator().manual_seed(0))
    return router


def hidden_states(config: ModelConfig) -> Tensor:
    return torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(1))


def route(config: ModelConfig) -> Routing:
    return router_of(config)(hidden_states(config), NO_IDS)


def test_routing_is_float32_in_a_bfloat16_model() -> None:
    config = small_config()
    router, x = router_of(config).bfloat16(), hidden_states(config).bfloat16()
    routing = router(x, NO_IDS)
    logits = x.double() @ router.weight.double().T
    for values in (routing.weights, routing.scores, routing.logits):
        assert values is not None
        assert values.dtype == torch.float32
    torch.testing.assert_close(routing.logits, logits.float(), rtol=1e-5, atol=1e-5)


def test_routing_is_float64_for_float64_hidden_states() -> None:
    config = small_config()
    router, x = router_of(config), hidden_states(config).double()
    logits = router(x, NO_IDS).logits
    assert logits is not None
    torch.testing.assert_close(logits, x @ router.weight.double().T, rtol=1e-14, atol=1e-14)


def test_a_bfloat16_model_runs_and_keeps_its_dtype() -> None:
    config = small_config()
    model = unit_variance_model(config, torch.bfloat16)
    output = model(random_ids(config, 2, 6), labels=random_ids(config, 2, 6))
    assert output.hidden.dtype == torch.bfloat16
    assert output.loss is not None
    assert output.loss.cross_entropy.dtype == torch.float32
    assert output.routing[0].expert_balance.dtype == torch.float32


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_weights_are_the_chosen_raw_probabilities(scoring: str) -> None:
    config = small_config(scoring_func=scoring)
    router, x = router_of(config), hidden_states(config)
    routing = router(x, NO_IDS)
    logits = x @ router.weight.T
    probabilities = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(dim=-1)
    torch.testing.assert_close(routing.weights.sort(dim=-1, descending=True).values, probabilities.topk(3).values)
    torch.testing.assert_close(routing.weights, probabilities.gather(1, routing.expert_indices))
    torch.testing.assert_close(routing.scores, probabilities / probabilities.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_normalised_weights_sum_to_one_in_the_raw_proportions(scoring: str) -> None:
    raw, normalised = (route(small_config(scoring_func=scoring, norm_topk_prob=norm)) for norm in (False, True))
    assert torch.equal(raw.expert_indices, normalised.expert_indices)
    torch.testing.assert_close(normalised.weights, raw.weights / raw.weights.sum(dim=-1, keepdim=True))
    assert (raw.weights.sum(dim=-1) - 1).abs().min() > 1e-3


def test_tiny_sigmoids_still_normalise() -> None:
    """Driving all logits down must not shrink what is normalised, as an epsilon in the denominator would allow."""
    config = small_config(scoring_func="sigmoid", norm_topk_prob=True)
    router, x = router_of(config), hidden_states(config)
    with torch.no_grad():
        router.weight[:, 0] = 0
        x[:, 0] = 1
        high = router(x, NO_IDS)
        router.weight[:, 0] = -200
        low = router(x, NO_IDS)
    assert low.logits is not None
    assert low.logits.sigmoid().max() == 0
    chosen = low.logits.gather(1, low.expert_indices)
    torch.testing.assert_close(low.weights, chosen.softmax(dim=-1))
    torch.testing.assert_close(low.weights.sum(dim=-1), torch.ones(TOKENS))
    torch.testing.assert_close(low.scores.sum(dim=-1), torch.ones(TOKENS))  # type: ignore[union-attr]
    assert torch.equal(low.expert_indices.sort().values, high.expert_indices.sort().values)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_bias_changes_choices_and_nothing_else(scoring: str) -> None:
    config = small_config(bias_update_speed=0.1, scoring_func=scoring)
    router, x = router_of(config), hidden_states(config)
    before = router(x, NO_IDS)
    assert router.expert_bias is not None
    router.expert_bias[4], router.expert_bias[7] = 10.0, -10.0
    after = router(x, NO_IDS)
    assert (after.expert_indices == 4).any(dim=-1).all()
    assert not (after.expert_indices == 7).any()
    assert (before.expert_indices == 7).any()
    assert torch.equal(after.scores, before.scores)
    raw = before.logits.sigmoid() if scoring == "sigmoid" else before.scores
    torch.testing.assert_close(after.weights, raw.gather(1, after.expert_indices))


def test_the_bias_moves_against_the_load_and_sums_to_zero() -> None:
    router = TopKRouter(small_config(n_routed_experts=4, num_experts_per_tok=1, bias_update_speed=0.01))
    router.update_bias(torch.tensor([100, 3, 2, 1]), torch.tensor(1.0))
    assert router.expert_bias is not None
    # one expert above the mean of 26.5, three below: -1, 1, 1, 1, less their mean
    torch.testing.assert_close(router.expert_bias, 0.01 * torch.tensor([-1.5, 0.5, 0.5, 0.5]))
    router.update_bias(torch.tensor([5, 5, 5, 5]), torch.tensor(1.0))
    torch.testing.assert_close(router.expert_bias, 0.01 * torch.tensor([-1.5, 0.5, 0.5, 0.5]))


def test_a_skipped_step_leaves_the_bias_alone() -> None:
    router = TopKRouter(small_config(bias_update_speed=0.01))
    assert router.expert_bias is not None
    router.expert_bias.copy_(torch.linspace(-1, 1, 11))
    before = router.expert_bias.clone()
    router.update_bias(torch.arange(11), torch.tensor(0.0))
    assert torch.equal(router.expert_bias, before)


def test_the_bias_is_saved_but_not_trained_and_absent_when_off() -> None:
    on, off = (TopKRouter(small_config(bias_update_speed=speed)) for speed in (0.1, 0.0))
    assert set(on.state_dict()) == {"weight", "expert_bias"}
    assert [name for name, _ in on.named_parameters()] == ["weight"]
    assert set(off.state_dict()) == {"weight"}


@pytest.mark.parametrize("active", [1, 2])
def test_the_hash_router_is_balanced_fixed_and_distinct(active: int) -> None:
    config = small_config(routing="hash", vocab_size=1000, num_experts_per_tok=active)
    router = build_router(config)
    assert isinstance(router, HashRouter)
    ids = torch.arange(1000)
    routing = router(torch.empty(1000, 0), ids)
    for choice in routing.expert_indices.unbind(1):
        load = choice.bincount(minlength=11)
        assert load.max() - load.min() <= 1
    assert all(len(set(row)) == active for row in routing.expert_indices.tolist())
    assert torch.equal(routing.weights, torch.full((1000, active), 1 / active))
    torch.manual_seed(99)
    again = build_router(config)(torch.empty(1000, 0), ids)
    assert torch.equal(again.expert_indices, routing.expert_indices)
    # neighbours in the vocabulary do not go to neighbouring experts in turn
    steps = routing.expert_indices[1:, 0] - routing.expert_indices[:-1, 0]
    assert len(steps.unique()) > 11


def test_the_hash_table_is_made_where_the_model_is() -> None:
    with torch.device("meta"):
        router = HashRouter(small_config(routing="hash"))
    assert router.table.device.type == "meta"
    assert not router.state_dict()


def test_a_hash_model_follows_token_ids_alone() -> None:
    config = small_config(routing="hash", num_experts_per_tok=1, aux_loss_alpha=0.0, n_shared_experts=0)
    model = unit_variance_model(config)
    ids = random_ids(config, 2, 6)
    counts = [stats.counts for stats in model(ids).routing]
    expected = HashRouter(config).table[ids.flatten()].flatten().bincount(minlength=11)
    for layer in counts:
        assert layer[0].tolist() == expected.tolist()
