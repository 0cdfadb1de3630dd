"""Everything under `conf/` composes, and the experiments are the paper's."""

from __future__ import annotations

from itertools import product

import pytest
from config_helpers import CONF, EXPERIMENTS, SWEEPS, VARIANTS, composed
from omegaconf import OmegaConf

RECIPES = {
    "moe_2b": {
        "shape": (9, 1280, 10, 0, 8192),
        "experts": (1, 63, 7),
        "balance": (0.01, 0.0),
        "optim": (1.08e-3, "multistep"),
        "train": (25_000, 2048, 2048),
    },
    "moe_16b": {
        "shape": (28, 2048, 16, 1, 102_400),
        "experts": (2, 64, 6),
        "balance": (0.001, 0.0),
        "optim": (4.2e-4, "multistep"),
        "train": (106_449, 4608, 4096),
    },
    "moe_145b": {
        "shape": (62, 4096, 32, 1, 102_400),
        "experts": (4, 128, 12),
        "balance": (0.003, 0.05),
        "optim": (3.0e-4, "constant"),
        "train": (13_000, 4608, 4096),
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_experiments_are_table_7(name: str) -> None:
    config = composed(f"+experiment={name}")
    model, optim, train = config.model.build(), config.optim, config.train
    found = {
        "shape": (
            model.num_hidden_layers,
            model.hidden_size,
            model.num_attention_heads,
            model.first_k_dense_replace,
            model.vocab_size,
        ),
        "experts": (model.n_shared_experts, model.n_routed_experts, model.num_experts_per_tok),
        "balance": (model.aux_loss_alpha, model.device_aux_loss_alpha),
        "optim": (optim.lr, optim.schedule.shape),
        "train": (train.steps, train.global_batch_size, config.data.seq_len),
    }
    assert found == RECIPES[name]
    assert model.head_dim == 128
    assert model.num_key_value_heads == model.num_attention_heads
    assert model.initializer_range == 0.006
    assert not model.norm_topk_prob
    assert model.seq_aux
    assert (model.routing, model.scoring_func) == ("learned", "softmax")


@pytest.mark.parametrize("name", RECIPES)
def test_experiments_share_the_papers_optimizer(name: str) -> None:
    optim = composed(f"+experiment={name}").optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert optim.schedule.warmup_steps == 2000
    assert (optim.schedule.milestones, optim.schedule.factor) == ([0.8, 0.9], 0.316)


def test_145b_balances_over_four_device_groups() -> None:
    assert composed("+experiment=moe_145b").model.build().n_device_groups == 4


@pytest.mark.parametrize(("experiment", "variant"), product(EXPERIMENTS, VARIANTS))
def test_every_variant_of_every_experiment_composes(experiment: str, variant: str) -> None:
    config = composed(f"+experiment={experiment}", f"+variant={variant}")
    assert config.name == experiment


SWEEP_POINTS = [
    (experiment, sweep, override)
    for experiment, sweep in product(EXPERIMENTS, SWEEPS)
    for key, values in OmegaConf.load(CONF / "sweep" / f"{sweep}.yaml").hydra.sweeper.params.items()
    for override in (f"{key}={value}" for value in str(values).split(","))
]


@pytest.mark.parametrize(("experiment", "sweep", "override"), SWEEP_POINTS, ids=" ".join)
def test_every_point_of_every_sweep_composes(experiment: str, sweep: str, override: str) -> None:
    config = composed(f"+experiment={experiment}", f"+sweep={sweep}", override)
    assert config.model.build().num_params() > 0


def test_sweeps_lead_to_different_models() -> None:
    points = {(sweep, override) for _, sweep, override in SWEEP_POINTS}
    for sweep in SWEEPS:
        models = [
            repr(composed(f"+sweep={sweep}", override).model.build()) for name, override in points if name == sweep
        ]
        assert len(set(models)) == len(models) > 1
