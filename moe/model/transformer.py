"""The DeepSeekMoE transformer, written for one device: embedding, blocks, head.

Module and parameter names are those of the released state dict (without its leading "model."), except that a layer's
routed experts are stacked. Parallelism is applied from outside (`moe.parallel`); a pipeline stage is the same class
over a part of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from moe.config.model import ModelConfig
from moe.kernels.attention import SDPA_ORDER
from moe.model.attention import Attention, Documents, KVCache, Mask, document_mask, rotary_angles
from moe.model.balance import RoutingStats, Tokens
from moe.model.experts import MoE
from moe.model.head import LMHead, LossSums
from moe.model.mlp import MLP
from moe.model.recompute import recomputed
from moe.model.router import KeptChoice


class ModelOutput(NamedTuple):
    hidden: Tensor
    """(B, T, H): of the last block, or after the final norm where this stage has the head."""
    loss: LossSums | None
    """Where labels were given."""
    routing: list[RoutingStats]
    """One entry a MoE layer of this stage, in order."""


class Block(nn.Module):
    """Pre-norm attention and FFN (equations 1 and 2)."""

    def __init__(self, config: ModelConfig, layer: int, num_languages: int, experts: str, attention: str) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, attention)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MoE | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, num_languages, experts)
        else:
            self.mlp = MLP(config.hidden_size, int(config.intermediate_size))
        self.recompute = "none"
        """none, selective or full; see `moe.model.recompute`."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        tokens: Tokens,
        cache: KVCache | None = None,
        mask: Mask = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        """(B, T, H) -> (B, T, H) and, for a MoE layer, its statistics."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._forward(x, cos, sin, tokens, cache, mask)
        return recomputed(self.recompute, self._forward, x, cos, sin, tokens, None, mask, KeptChoice())

    def _forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        tokens: Tokens,
        cache: KVCache | None,
        mask: Mask,
        kept: KeptChoice | None = None,
    ) -> tuple[Tensor, RoutingStats | None]:
        with sdpa_kernel(SDPA_ORDER, set_priority=True):
            x, normed = self.attend(x, cos, sin, cache, mask)
        if isinstance(self.mlp, MoE):
            stream, stats = self.mlp(normed, x, tokens, kept)
            return stream, stats
        return x + self.mlp(normed), None

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, mask: Mask = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm: one compiled region, as all shapes are static but for the
        number of documents, on which nothing else depends."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x, self.post_attention_layernorm(x)


class Transformer(nn.Module):
    """The whole network, or the pipeline stage made of `layers`; the first stage embeds, the last one has norm and
    head."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_languages: int = 1,
        expert_backend: str = "loop",
        attention_backend: str = "sdpa",
        loss_chunk_size: int = 8192,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.attention_backend = config, attention_backend
        layers = range(config.num_hidden_layers) if layers is None else layers
        first, last = layers[0] == 0, layers[-1] == config.num_hidden_layers - 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if first else None
        # keyed by the global index, so that a stage's parameters keep their names
        backends = (expert_backend, attention_backend)
        self.layers = nn.ModuleDict({str(i): Block(config, i, num_languages, *backends) for i in layers})
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if last else None
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, num_languages, loss_chunk_size) if last else None
        self.own_tokens: Callable[[Tokens], Tokens] = _all
        """Those whose hidden states lie between the matrices here; all but under sequence parallelism."""

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        label_languages: Tensor | None = None,
        languages: Tensor | None = None,
        valid: Tensor | None = None,
        hidden: Tensor | None = None,
        caches: list[KVCache] | None = None,
        documents: Documents | None = None,
    ) -> ModelOutput:
        """(B, T) ids -> ModelOutput. A later pipeline stage is given the former's `hidden`; generation gives `caches`,
        one a block.

        `languages` and `label_languages` (B, T) index the language of inputs and labels (default: all 0); `valid` is
        False at padding. With `documents` positions restart in each of them and attention stays within; they and
        `caches` exclude each other (ValueError).
        """
        if caches and documents is not None:
            raise ValueError("a cache continues rows as one document each: give caches or documents")
        tokens = Tokens(
            input_ids,
            torch.zeros_like(input_ids) if languages is None else languages,
            torch.ones_like(input_ids, dtype=torch.bool) if valid is None else valid,
        )
        tokens = self.own_tokens(tokens)
        x = hidden if self.embed_tokens is None else self.embed_tokens(input_ids)
        assert x is not None
        if documents is None:
            start = caches[0].length if caches else 0
            positions, mask = torch.arange(start, start + input_ids.shape[1], device=input_ids.device), None
        else:
            positions = documents.position_ids
            mask = document_mask(documents, self.config.head_dim, x.dtype, self.attention_backend)
        cos, sin = rotary_angles(
            positions, self.config.head_dim, self.config.rope_theta, torch.promote_types(x.dtype, torch.float32)
        )
        routing = []
        for index, block in enumerate(self.layers.values()):
            x, stats = block(x, cos, sin, tokens, caches[index] if caches else None, mask)
            if stats is not None:
                routing.append(stats)
        if self.norm is None or self.lm_head is None:
            return ModelOutput(x, None, routing)
        x = self.norm(x)
        if labels is None:
            return ModelOutput(x, None, routing)
        if label_languages is None:
            label_languages = torch.zeros_like(labels)
        return ModelOutput(x, self.lm_head(x, labels, label_languages), routing)

    def moe_blocks(self) -> list[MoE]:
        """The mixtures of this stage, in the order of `ModelOutput.routing`."""
        return [block.mlp for block in self.layers.values() if isinstance(block.mlp, MoE)]


def _all(tokens: Tokens) -> Tokens:
    return tokens
