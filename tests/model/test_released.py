from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from model_helpers import small_config, unit_variance_model

from moe.checkpoint import CheckpointError
from moe.checkpoint.released import from_released, released_config, released_shapes, to_released
from moe.config import ModelConfig, from_hydra, register_schema
from moe.model import Transformer

CONF = Path(__file__).parents[2] / "conf"
RELEASED_CONFIG = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 102400,
}


@pytest.fixture(scope="module")
def config_16b() -> ModelConfig:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_hydra(compose("config", ["+experiment=moe_16b"])).model.build()


def released_table() -> dict[str, tuple[int, ...]]:
    """The released index as published: name pattern by name pattern, with shapes."""
    hidden = 2048
    table: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    table |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (102400, hidden))
    for layer in range(28):
        prefix = f"model.layers.{layer}"
        table |= {f"{prefix}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        table |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        widths = {"": 10944} if layer == 0 else {f".experts.{i}": 1408 for i in range(64)} | {".shared_experts": 2816}
        for part, width in widths.items():
            table |= {f"{prefix}.mlp{part}.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
            table[f"{prefix}.mlp{part}.down_proj.weight"] = (hidden, width)
        if layer:
            table[f"{prefix}.mlp.gate.weight"] = (64, hidden)
    return table


def test_the_16b_state_dict_is_the_released_one(config_16b: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config_16b).bfloat16()
    released = to_released(model.state_dict(), config_16b)
    assert len(released) == 5466
    assert {name: tuple(tensor.shape) for name, tensor in released.items()} == released_table()
    assert sum(tensor.numel() for tensor in released.values()) == 16_375_728_128
    assert sum(tensor.nbytes for tensor in released.values()) == 32_751_456_256


def test_counts_by_kind(config_16b: ModelConfig) -> None:
    kinds = Counter(name.split(".mlp.")[-1].split(".")[0] for name in released_shapes(config_16b) if ".mlp." in name)
    assert kinds["experts"] == 3 * 1728
    assert kinds["gate"] == 27
    assert kinds["shared_experts"] == 3 * 27


VARIANTS = [
    {},
    {"first_k_dense_replace": 1, "num_key_value_heads": 2},
    {"n_shared_experts": 0},
    {"n_shared_experts": 3, "moe_layer_freq": 2},
    {"n_routed_experts": 0, "num_experts_per_tok": 0, "n_shared_experts": 0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_round_trip_is_bitwise(changes: dict[str, int]) -> None:
    config = small_config(**changes)
    state = unit_variance_model(config).state_dict()
    released = to_released(state, config)
    assert sum(math.prod(shape) for shape in released_shapes(config).values()) == config.num_params()
    back = from_released(released, config)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


def test_experts_keep_their_number_and_their_gate_and_up() -> None:
    config = small_config()
    state = unit_variance_model(config).state_dict()
    released = to_released(state, config)
    gate, up = state["layers.1.mlp.experts.gate_up_proj"][5]
    assert torch.equal(released["model.layers.1.mlp.experts.5.gate_proj.weight"], gate)
    assert torch.equal(released["model.layers.1.mlp.experts.5.up_proj.weight"], up)
    assert released["model.layers.1.mlp.experts.5.up_proj.weight"].data_ptr() == up.data_ptr()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("model.layers.2.mlp.experts.7.up_proj.weight"),
            r"^model.layers.2.mlp.experts.7.up_proj.weight: miss",
        ),
        (lambda t: t.update({"model.extra": torch.ones(1)}), r"^model.extra: .* no such tensor"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"^model.norm.weight: shape \(31,\), .* \(32,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_reading_is_strict(damage: object, message: str) -> None:
    config = small_config()
    released = to_released(unit_variance_model(config).state_dict(), config)
    damage(released)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        from_released(released, config)


def test_a_selection_bias_has_no_released_name() -> None:
    config = small_config(bias_update_speed=1e-3)
    with pytest.raises(CheckpointError, match="mlp.gate.expert_bias"):
        to_released(unit_variance_model(config).state_dict(), config)


def test_a_state_dict_of_another_configuration_is_refused() -> None:
    state = unit_variance_model(small_config()).state_dict()
    with pytest.raises(CheckpointError, match="model.layers.0.mlp.shared_experts.gate_proj.weight"):
        to_released(state, small_config(n_shared_experts=2))


def test_config_json_is_the_released_one_but_for_the_papers_initialisation(config_16b: ModelConfig) -> None:
    written = released_config(config_16b, bos_token_id=100000, eos_token_id=100001)
    assert written == RELEASED_CONFIG | {"initializer_range": 0.006}


@pytest.mark.parametrize(
    "changes", [{"routing": "hash"}, {"scoring_func": "sigmoid"}, {"bias_update_speed": 0.1}], ids=str
)
def test_config_json_refuses_what_the_released_code_lacks(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=f"model.{next(iter(changes))}="):
        released_config(small_config(**changes), None, None)
