"""Cutting a step into micro-batches changes nothing: loss, gradients, balance terms, bias updates."""

from __future__ import annotations

import pytest
import torch
from parallel_helpers import (
    SEQUENCES,
    accumulate,
    assert_all_close,
    build_model,
    build_trainer,
    clipped_step,
    config_of,
    gradients,
    ragged_batch,
    split,
    state,
)

from moe.parallel import World
from moe.training.optimizer import gradient_norm


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_gradients_do_not_depend_on_the_cut(world: World, parts: int) -> None:
    batch = ragged_batch()
    results = []
    for batches in ([batch], split(batch, parts)):
        model = build_model(config_of(), world)
        results.append((accumulate(model, batches), gradients(model)))
    (loss, whole), (cut_loss, cut) = results
    torch.testing.assert_close(cut_loss, loss, rtol=1e-6, atol=0)
    assert len(whole) == len(list(model.parameters()))
    assert_all_close(cut, whole, 5e-6)


def test_micro_batches_with_unequal_numbers_of_labels_count_each_label_once(world: World) -> None:
    batch = ragged_batch()
    counts = [part.num_labels() for part in split(batch, 4)]
    assert len(set(counts)) > 1
    batch.labels[SEQUENCES // 2 :] = -100
    model = build_model(config_of(), world)
    loss = accumulate(model, split(batch, 4))
    torch.testing.assert_close(loss, accumulate(build_model(config_of(), world), [batch]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_does_not_depend_on_the_cut(world: World, parts: int) -> None:
    batch = ragged_batch()
    trainers = [build_trainer(config_of(), world) for _ in range(2)]
    for trainer, batches in zip(trainers, ([batch], split(batch, parts)), strict=True):
        trainer.step(0, batches)
    whole, cut = (state(trainer) for trainer in trainers)
    biases = [name for name in whole if name.endswith("expert_bias")]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(cut[name], whole[name]), name
        assert whole[name].abs().max() > 0
    assert_all_close(cut, whole, 2e-5)
    assert torch.equal(trainers[0].sums.counts, trainers[1].sums.counts)
    torch.testing.assert_close(trainers[0].sums.packed, trainers[1].sums.packed, rtol=1e-6, atol=1e-6)


def test_the_balance_terms_count_in_full_for_every_layer(world: World) -> None:
    """Without them the routers of both layers would get other gradients."""
    batch = ragged_batch()
    with_terms, without = (
        build_model(config_of(aux_loss_alpha=a, device_aux_loss_alpha=a, router_z_loss_alpha=a), world)
        for a in (0.5, 0.0)
    )
    accumulate(with_terms, [batch])
    accumulate(without, [batch])
    found, missing = gradients(with_terms), gradients(without)
    for layer in (1, 2):
        name = f"layers.{layer}.mlp.gate.weight"
        assert (found[name] - missing[name]).norm() > 0.1 * found[name].norm()


def test_clipping_scales_all_gradients_to_the_norm(world: World) -> None:
    config = config_of()
    model = build_model(config, world)
    accumulate(model, [ragged_batch()])
    before = gradients(model)
    norm = gradient_norm(model, world)
    expected = torch.cat([g.flatten() for g in before.values()]).double().norm()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    for share in (10.0, 0.5):
        clipped = clipped_step(model, config, norm, share * norm.item())
        for name, gradient in before.items():
            torch.testing.assert_close(clipped[name], min(share, 1) * gradient, rtol=1e-5, atol=1e-9)
