"""Other frameworks' models of a configuration's shape, with the plainest training step around them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from moe.config import Config, ModelConfig


class PlainStep:
    """Forward, backward, clipping and fused AdamW; parameters in float32, computed under autocast where the
    configuration computes in bfloat16."""

    def __init__(self, model: nn.Module, config: Config, device: torch.device, compiled: bool) -> None:
        self.device, self.max_norm = device, config.optim.max_grad_norm
        self.dtype = getattr(torch, config.train.compute_dtype)
        self.model = model.train()
        self.run = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay, fused=True
        )

    def __call__(self, micro_batches: list[Batch]) -> None:
        for batch in micro_batches:
            ids = batch.input_ids.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss: Tensor = self.run(input_ids=ids, labels=ids).loss
            (loss / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


def transformers(config: ModelConfig) -> nn.Module:
    """transformers' Qwen2-MoE, its experts by grouped_mm, with the balance loss of each layer. It has a gate on the
    shared expert that ours has not."""
    package: Any = importlib.import_module("transformers")
    settings = package.Qwen2MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        intermediate_size=int(config.intermediate_size),
        moe_intermediate_size=int(config.moe_intermediate_size),
        shared_expert_intermediate_size=config.n_shared_experts * int(config.moe_intermediate_size),
        num_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        mlp_only_layers=[i for i in range(config.num_hidden_layers) if not config.is_moe_layer(i)],
        output_router_logits=True,
        router_aux_loss_coef=config.aux_loss_alpha,
        qkv_bias=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    settings._experts_implementation = "grouped_mm"
    model: nn.Module = package.Qwen2MoeForCausalLM(settings)
    return model


MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {"transformers": transformers}
