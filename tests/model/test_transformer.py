from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import random_ids, small_config, unit_variance_model
from torch import Tensor

from moe.config import ModelConfig
from moe.model import KVCache, Transformer
from moe.model.attention import apply_rotary, rotary_angles
from moe.model.reference import reference_logits

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"scoring_func": "sigmoid"},
    "norm_topk": {"norm_topk_prob": True},
    "sigmoid_norm_topk": {"scoring_func": "sigmoid", "norm_topk_prob": True},
    "gqa": {"num_key_value_heads": 2},
    "first_dense": {"first_k_dense_replace": 1},
    "every_second_layer": {"moe_layer_freq": 2},
    "no_shared": {"n_shared_experts": 0},
    "three_shared": {"n_shared_experts": 3},
    "dense": {"n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 0},
    "top_1": {"num_experts_per_tok": 1, "n_shared_experts": 0},
    "all_active": {"num_experts_per_tok": 11},
}
# largest error in units of the logits' standard deviation
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


def logits_of(model: Transformer, ids: Tensor, **options: Any) -> Tensor:
    assert model.lm_head is not None
    return model.lm_head.logits(model(ids, **options).hidden)


def config_of(architecture: str) -> ModelConfig:
    return small_config(**ARCHITECTURES[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, "loop"), (torch.float32, "loop"), (torch.float32, "grouped_mm")], ids=str
)
def test_logits_equal_the_reference(architecture: str, dtype: torch.dtype, backend: str) -> None:
    config = config_of(architecture)
    model = unit_variance_model(config, dtype, expert_backend=backend)
    ids = random_ids(config, 2, 7)
    exact = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = reference_logits(exact, config, ids)
    assert 0.3 < expected.std() < 3
    error = (logits_of(model, ids).double() - expected).abs().max() / expected.std()
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("architecture", ["softmax", "gqa", "first_dense"])
def test_a_cache_filled_bit_by_bit_gives_the_full_pass(architecture: str) -> None:
    config = config_of(architecture)
    model = unit_variance_model(config, torch.float64)
    ids = random_ids(config, 2, 9)
    caches = [KVCache(config, 2, 9, torch.device("cpu"), torch.float64) for _ in model.layers]
    steps = [logits_of(model, chunk, caches=caches) for chunk in ids.split([3, 1, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits_of(model, ids), rtol=0, atol=1e-12)


def test_a_full_cache_says_so() -> None:
    config = small_config()
    model = unit_variance_model(config)
    caches = [KVCache(config, 1, 4, torch.device("cpu"), torch.float32) for _ in model.layers]
    with pytest.raises(ValueError, match="the cache holds 4 positions, 5 were asked for"):
        model(random_ids(config, 1, 5), caches=caches)


@pytest.mark.parametrize("architecture", ["softmax", "gqa"])
def test_no_token_sees_a_later_one(architecture: str) -> None:
    config = config_of(architecture)
    model = unit_variance_model(config, torch.float64)
    ids = random_ids(config, 1, 8)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % config.vocab_size
    before, after = logits_of(model, ids), logits_of(model, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(dim=-1) > 1e-3).all()


def test_positions_matter_only_by_their_distance() -> None:
    """Without it a wrong rotation could still pass as causal: one head's product depends on t - s alone."""
    cos, sin = rotary_angles(torch.arange(20), 8, 10000.0, torch.float64)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    rotated_q = apply_rotary(q.expand(1, 20, 1, 8), cos, sin)[0, :, 0]
    rotated_k = apply_rotary(k.expand(1, 20, 1, 8), cos, sin)[0, :, 0]
    products = rotated_q @ rotated_k.T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)


def test_padding_is_not_routed_and_changes_nothing_before_it() -> None:
    config = small_config()
    model = unit_variance_model(config, torch.float64)
    ids = random_ids(config, 2, 6)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, 4:] = False
    output = model(ids, valid=valid)
    for stats in output.routing:
        assert stats.counts.sum() == 10 * config.num_experts_per_tok
    assert model.lm_head is not None
    torch.testing.assert_close(
        model.lm_head.logits(output.hidden)[valid], logits_of(model, ids)[valid], rtol=0, atol=1e-12
    )


def test_two_stages_are_the_whole_and_keep_their_names() -> None:
    config = small_config(first_k_dense_replace=1)
    whole = unit_variance_model(config, torch.float64)
    state = whole.state_dict()
    first = Transformer(config, layers=[0]).double()
    last = Transformer(config, layers=[1, 2]).double()
    assert set(first.state_dict()).isdisjoint(last.state_dict())
    assert set(first.state_dict()) | set(last.state_dict()) == set(state)
    for stage in (first, last):
        stage.load_state_dict({name: state[name] for name in stage.state_dict()})
    ids = random_ids(config, 2, 6)
    labels = random_ids(config, 2, 6, seed=1)
    handed_over = first(ids)
    assert handed_over.loss is None
    output = last(ids, hidden=handed_over.hidden, labels=labels)
    expected = whole(ids, labels=labels)
    assert torch.equal(output.hidden, expected.hidden)
    assert torch.equal(output.loss.cross_entropy, expected.loss.cross_entropy)
    for found, wanted in zip(handed_over.routing + output.routing, expected.routing, strict=True):
        assert torch.equal(found.counts, wanted.counts)


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    config = small_config()
    model = unit_variance_model(config, torch.float64)
    ids, labels = random_ids(config, 2, 6), random_ids(config, 2, 6, seed=1)
    loss = model(ids, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(logits_of(model, ids).flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss is not None
    torch.testing.assert_close(loss.cross_entropy.double(), expected[None], rtol=1e-6, atol=0)
    assert loss.labels.tolist() == [12]


def test_every_parameter_gets_a_gradient() -> None:
    config = small_config(first_k_dense_replace=1)
    model = unit_variance_model(config)
    model(random_ids(config, 4, 8), labels=random_ids(config, 4, 8, seed=1)).loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
