"""Every parameter count and FLOP figure of the paper that follows from its shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from config_helpers import RUNGS, VARIANTS, composed

from moe.config import ArchitectureConfig, ModelConfig
from moe.model import Transformer

TERA, GIGA = 1e12, 1e9


def rung(*overrides: str, **changes: object) -> ArchitectureConfig:
    """The architecture of `overrides`, at the paper's unrounded 8/3 d where `standard_ffn_size=None`."""
    return dataclasses.replace(composed(*overrides).model, **changes)


def paper_2b(variant: str = "deepseekmoe") -> ModelConfig:
    return rung("+experiment=moe_2b", f"+variant={variant}", standard_ffn_size=None).nominal()


def nominal_dense(layers: int, vocab_size: int) -> ModelConfig:
    architecture = ArchitectureConfig(
        vocab_size=vocab_size, hidden_size=4096, num_hidden_layers=layers, num_attention_heads=32, dense_multiple=1
    )
    return architecture.nominal()


def teraflops(config: ModelConfig, seq_len: int) -> float:
    return config.flops_per_token(seq_len) * seq_len / TERA


def gshard_137b() -> ArchitectureConfig:
    """Table 6: 0 + 16 full-size experts, 2 active, first layer dense."""
    return rung("+experiment=moe_145b", granularity=1, n_shared_experts=0, expert_budget=16.0)


def half_142b() -> ArchitectureConfig:
    """Table 6: 2 + 128 experts, 2 + 6 active."""
    return rung("+experiment=moe_145b", n_shared_experts=2, expert_budget=16.25, active_budget=1.0)


def test_16b_counts_are_those_of_the_released_weights() -> None:
    config = rung("+experiment=moe_16b").build()
    assert (config.moe_intermediate_size, config.intermediate_size) == (1408, 10944)
    assert (config.n_shared_experts, config.n_routed_experts, config.num_experts_per_tok) == (2, 64, 6)
    assert config.num_params() == 16_375_728_128
    assert config.num_active_params() == 2_828_650_496


def test_16b_flops() -> None:
    architecture = rung("+experiment=moe_16b")
    assert round(teraflops(architecture.build(), 4096), 1) == 75.8
    assert round(teraflops(architecture.nominal(), 4096), 1) == 74.4


@pytest.mark.parametrize(
    ("variant", "printed"),
    [
        ("deepseekmoe", 4.3),
        ("gshard", 4.3),
        ("dense", 2.9),
        ("hash_layer", 2.9),
        ("switch", 2.9),
        ("gshard_x1.5", 5.8),
        ("dense_x16", 24.6),
    ],
)
def test_flops_of_the_2b_family(variant: str, printed: float) -> None:
    assert round(teraflops(paper_2b(variant), 2048), 1) == printed


@pytest.mark.parametrize(
    ("variant", "total", "active"),
    [
        ("deepseekmoe", 1.89, 0.24),
        ("gshard", 1.89, 0.24),
        ("gshard_x1.2", 2.3, 0.28),
        ("gshard_x1.5", 2.83, 0.35),
        ("dense_x4", 0.47, 0.47),
        ("dense_x16", 1.89, 1.89),
    ],
)
def test_expert_parameters_of_the_2b_family(variant: str, total: float, active: float) -> None:
    config = paper_2b(variant)
    digits = 1 if variant == "gshard_x1.2" else 2
    assert round(config.expert_params() / GIGA, digits) == total
    assert round(config.active_expert_params() / GIGA, 2) == active


@pytest.mark.parametrize(
    ("variant", "total", "active"),
    [
        ("deepseekmoe", 2.0, 0.3),
        ("gshard", 2.0, 0.3),
        ("switch", 2.0, 0.2),
        ("hash_layer", 2.0, 0.2),
        ("dense", 0.2, 0.2),
    ],
)
def test_table_1_parameters(variant: str, total: float, active: float) -> None:
    config = paper_2b(variant)
    assert round(config.num_params() / GIGA, 1) == total
    assert round(config.num_active_params() / GIGA, 1) == active


def test_gshard_x15_is_the_abstracts_2_9b() -> None:
    assert round(paper_2b("gshard_x1.5").num_params() / GIGA, 1) == 2.9


def test_dense_7b_flops() -> None:
    assert round(teraflops(nominal_dense(30, 102400), 4096), 1) == 183.5
    assert round(teraflops(nominal_dense(32, 32000), 4096), 1) == 187.9


def test_145b() -> None:
    config = rung("+experiment=moe_145b").build()
    assert (config.moe_intermediate_size, config.intermediate_size) == (1408, 21888)
    assert (config.n_shared_experts, config.n_routed_experts, config.num_experts_per_tok) == (4, 128, 12)
    assert round(config.num_params() / GIGA, 1) == 144.6
    assert round(config.num_active_params() / GIGA, 1) == 22.2
    assert teraflops(config, 4096) == pytest.approx(585.6, rel=1e-3)


def test_gshard_137b() -> None:
    architecture = gshard_137b()
    config = architecture.build()
    assert (config.n_routed_experts, config.num_experts_per_tok) == (16, 2)
    assert (config.moe_intermediate_size, config.intermediate_size) == (10944, 21888)
    assert round(config.num_params() / GIGA, 1) == 136.5
    assert config.num_active_params() / GIGA == pytest.approx(21.65, abs=0.1)
    assert round(teraflops(architecture.nominal(), 4096), 1) == 572.7


def test_half_of_145b() -> None:
    config = half_142b().build()
    assert (config.n_routed_experts, config.num_experts_per_tok) == (128, 6)
    assert config.intermediate_size == 10944
    assert config.num_params() / GIGA == pytest.approx(142.3, rel=1e-3)
    assert teraflops(config, 4096) == pytest.approx(374.6, rel=1e-3)


@pytest.mark.parametrize("name", RUNGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_parameters_are_the_modules(name: str, variant: str) -> None:
    config = rung(f"+experiment={name}", f"+variant={variant}").build()
    with torch.device("meta"):
        model = Transformer(config)
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes", [{"num_key_value_heads": 2}, {"moe_layer_freq": 2}, {"first_k_dense_replace": 1}], ids=str
)
def test_counted_parameters_follow_the_architecture(changes: dict[str, int]) -> None:
    config = rung("+experiment=moe_tiny", **changes).build()
    with torch.device("meta"):
        model = Transformer(config)
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["moe_tiny", "moe_100m", "moe_2b"])
def test_granularity_changes_neither_expert_parameters_nor_flops(name: str) -> None:
    builds = [rung(f"+experiment={name}", "+sweep=granularity", f"model.granularity={m}").build() for m in (1, 2, 4, 8)]
    assert len({build.expert_params() for build in builds}) == 1
    assert len({build.active_expert_params() for build in builds}) == 1
    assert len({build.flops_per_token(1024) for build in builds}) == 1
    assert len({build.n_routed_experts for build in builds}) == 4


def test_granularity_of_16b_stays_within_its_tolerance() -> None:
    standard_ffn = 8 * 2048**2
    for granularity in (1, 2, 4, 8):
        architecture = rung("+experiment=moe_16b", "+sweep=granularity", f"model.granularity={granularity}")
        mixtures = architecture.build().expert_params() - 3 * 2048 * 10944
        assert mixtures / 27 / standard_ffn == pytest.approx(16.5, rel=architecture.budget_tolerance)


@pytest.mark.parametrize("name", RUNGS)
def test_shared_experts_are_taken_out_of_the_budget(name: str) -> None:
    builds = [
        rung(f"+experiment={name}", "+sweep=shared_experts", f"model.n_shared_experts={k}").build() for k in (1, 2, 4)
    ]
    assert len({build.expert_params() for build in builds}) == 1
    assert len({build.flops_per_token(1024) for build in builds}) == 1


@pytest.mark.parametrize(
    ("variant", "shared", "routed", "active"),
    [
        ("deepseekmoe", 1, 63, 7),
        ("isolation", 1, 15, 1),
        ("gshard", 0, 16, 2),
        ("gshard_x1.5", 0, 16, 2),
        ("switch", 0, 16, 1),
        ("hash_layer", 0, 16, 1),
        ("half_active", 1, 63, 3),
        ("dense_x4", 0, 0, 0),
    ],
)
def test_variants_have_the_papers_experts(variant: str, shared: int, routed: int, active: int) -> None:
    config = rung("+experiment=moe_2b", f"+variant={variant}").build()
    assert (config.n_shared_experts, config.n_routed_experts, config.num_experts_per_tok) == (shared, routed, active)


def test_iso_variants_of_2b_have_equal_expert_parameters() -> None:
    builds = {
        v: rung("+experiment=moe_2b", f"+variant={v}").build()
        for v in ("deepseekmoe", "isolation", "gshard", "dense_x16")
    }
    assert len({build.expert_params() for build in builds.values()}) == 1
    assert builds["gshard"].flops_per_token(2048) == builds["deepseekmoe"].flops_per_token(2048)
