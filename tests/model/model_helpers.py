"""Small networks at unit variance, and batches to feed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.model import Transformer

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_routed_experts": 11,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 32,
}


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def unit_variance_model(config: ModelConfig, dtype: torch.dtype = torch.float32, **options: Any) -> Transformer:
    """Weights that keep activations at a variance of about one, and gains away from 1, so that no term drowns."""
    model = Transformer(config, **options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            offset = 0.0 if parameter.dim() > 1 else 1.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        assert model.embed_tokens is not None
        model.embed_tokens.weight.mul_(config.hidden_size**0.5)
    return model


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
