"""Names and shapes of the released model: our state dict and that of `DeepseekForCausalLM`, one to one.

Ours leaves out the leading "model." and stacks a layer's routed experts, gate and up together; all else is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.manifest import CheckpointError
from moe.config.model import ModelConfig

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_GATE_UP, _DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its released name; 5,466 of them for the 16B model."""
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (config.hidden_size,)}
    for name in ("model.embed_tokens", "lm_head"):
        shapes[f"{name}.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        for name, shape in _layer_shapes(config, layer):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = config.hidden_size, int(config.moe_intermediate_size)
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield from (("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)))
    yield from (("self_attn.q_proj", (query, hidden)), ("self_attn.o_proj", (hidden, query)))
    yield from ((f"self_attn.{name}_proj", (key, hidden)) for name in "kv")
    if not config.is_moe_layer(layer):
        yield from _mlp_shapes("mlp", hidden, int(config.intermediate_size))
        return
    yield "mlp.gate", (config.n_routed_experts, hidden)
    for expert in range(config.n_routed_experts):
        yield from _mlp_shapes(f"mlp.experts.{expert}", hidden, width)
    if config.n_shared_experts:
        yield from _mlp_shapes("mlp.shared_experts", hidden, config.n_shared_experts * width)


def _mlp_shapes(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in zip(_PROJECTIONS, ((width, hidden), (width, hidden), (hidden, width)), strict=True):
        yield f"{prefix}.{name}", shape


def to_released(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A `Transformer` state dict under the released names; the tensors are views of ours.

    Raises CheckpointError naming the first key that is missing, has another shape, or is unknown to the released model
    (a selection bias).
    """
    released = {}
    for name, tensor in state.items():
        if name.endswith(_GATE_UP):
            gate, up = tensor.unbind(1)  # (E, 2, I, H) -> 2 x (E, I, H)
            released.update(_by_expert(name.removesuffix("gate_up_proj"), "gate_proj", gate))
            released.update(_by_expert(name.removesuffix("gate_up_proj"), "up_proj", up))
        elif name.endswith(_DOWN):
            released.update(_by_expert(name.removesuffix("down_proj"), "down_proj", tensor))
        else:
            released[name if name == "lm_head.weight" else f"model.{name}"] = tensor
    _check(released, config)
    return released


def _by_expert(prefix: str, projection: str, stacked: Tensor) -> dict[str, Tensor]:
    return {f"model.{prefix}{expert}.{projection}.weight": weight for expert, weight in enumerate(stacked.unbind(0))}


def from_released(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The reverse of `to_released`; experts are copied into their stacks, all else is shared.

    Raises CheckpointError naming the first key that is missing, unexpected or of another shape than `config`'s.
    """
    _check(tensors, config)
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{expert}.{name}.weight"] for expert in range(config.n_routed_experts)])
            for name in _PROJECTIONS
        )
        state[f"layers.{layer}{_GATE_UP}"] = torch.stack([gate, up], dim=1)
        state[f"layers.{layer}{_DOWN}"] = down
    return state


def _check(tensors: dict[str, Tensor], config: ModelConfig) -> None:
    expected = released_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{name}: missing among the released model's tensors")
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{name}: shape {tuple(tensors[name].shape)}, the configuration asks for {shape}")
    for name in tensors:
        if name not in expected:
            raise CheckpointError(f"{name}: the released model of this configuration has no such tensor")


_UNVARIED = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "hidden_act": "silu",
    "model_type": "deepseek",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
}
_SHARED_KEYS = (
    *("first_k_dense_replace", "hidden_size", "initializer_range", "max_position_embeddings", "moe_layer_freq"),
    *("norm_topk_prob", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads"),
    *("rms_norm_eps", "rope_theta", "scoring_func", "vocab_size"),
)


def released_config(config: ModelConfig, bos_token_id: int | None, eos_token_id: int | None) -> dict[str, Any]:
    """The 32 keys of the released config.json, for `config`; the ids are the tokenizer's (16B: 100000 and 100001).

    Raises CheckpointError for routing that the released code does not have.
    """
    for key, value, released in (
        ("routing", config.routing, "learned"),
        ("scoring_func", config.scoring_func, "softmax"),
        ("bias_update_speed", config.bias_update_speed, 0),
    ):
        if value != released:
            raise CheckpointError(f"model.{key}={value}: the released model only knows {released}")
    return {
        **_UNVARIED,
        **{key: getattr(config, key) for key in _SHARED_KEYS},
        "intermediate_size": int(config.intermediate_size),
        "moe_intermediate_size": int(config.moe_intermediate_size),
        "n_routed_experts": config.n_routed_experts or None,
        "n_shared_experts": config.n_shared_experts or None,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }
