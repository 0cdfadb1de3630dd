"""Causal self-attention with rotary positions, multi-head or grouped-query, and a key/value cache for generation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from moe.config.model import ModelConfig

# On Hopper cuDNN's attention is 1.8 times as fast as the flash kernel torch ships (docs/log.md); the others are
# fallbacks.
ATTENTION_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class KVCache:
    """Keys and values of one layer, filled left to right. Shapes (B, kv_heads, max_len, head_dim)."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, max_len, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, kv_heads, T, head_dim) and return all keys and values so far. Raises ValueError when full."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} were asked for")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines in the released model's convention: (T,) -> 2 x (T, head_dim), the halves equal."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim)
    angles = positions.to(dtype)[:, None] * frequencies  # (T,) -> (T, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, heads, head_dim) by (T, head_dim) angles, in the angles' dtype.

    Halves are paired, not neighbours (LLaMA's rotate_half).
    """
    exact = x.to(cos.dtype)
    first, second = exact.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (exact * cos[:, None] + rotated * sin[:, None]).to(x.dtype)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V with a causal mask; names as in the released state dict, no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rotary(self.q_proj(x).view(heads), cos, sin).transpose(1, 2)
        k = apply_rotary(self.k_proj(x).view(heads), cos, sin).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(causal_attention(q, k, v).transpose(1, 2).flatten(2))


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, T, D) x (B, kv_heads, S, D) -> (B, heads, T, D); the T queries are the last of the S positions."""
    queries, keys = q.shape[2], k.shape[2]
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    mask = None
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=queries == keys)
