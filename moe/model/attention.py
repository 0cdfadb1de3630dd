"""Causal self-attention with rotary positions, multi-head or grouped-query, within a row or within documents, and a
key/value cache for generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.config.model import ModelConfig
from moe.kernels.attention import masked_attention, row_attention, span_attention, takes_spans
from moe.model.mlp import Linear


@dataclass(frozen=True)
class Documents:
    """Where the documents of a (B, T) batch lie: a token attends to the earlier ones of its span, to no others.

    A span is a document or the part of one that a row holds; it never crosses rows. The two tensors say the same, each
    in the form that some kernels want; neither is read on the host.

    Attributes:
        position_ids: (B, T) int, counted from the start of the span, so 0 in the first column.
        cu_seqlens: (n,) int32, bounds of the spans among the B T tokens, from 0 to B T, which may be repeated.
        max_length: length that no span exceeds, T at most.
    """

    position_ids: Tensor
    cu_seqlens: Tensor
    max_length: int

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, T, T), to add to scores: 0 where the query of the third dimension may see the key of the fourth, else
        -inf.

        A boolean mask would be smaller, but every layer would turn it into a bias of its own and keep that for the
        backward pass.
        """
        places = torch.arange(self.position_ids.shape[1], device=self.position_ids.device)
        starts = places - self.position_ids
        hidden = (places < starts[:, None, :, None]).logical_or_(places > places[:, None])
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True)
class Packed:
    """Spans for a kernel that takes all rows as one sequence of tokens, cut at `cu_seqlens`."""

    cu_seqlens: Tensor
    max_length: int


Mask = Packed | Tensor | None
"""What a token may see: its span, as bounds or as a bias of all scores, or (None) all before it in its row."""


def document_mask(documents: Documents, head_dim: int, dtype: torch.dtype, backend: str) -> Packed | Tensor:
    """`documents` for heads of `head_dim` in `dtype`; made once a forward pass, for all layers.

    A packed kernel leaves out the pairs that a bias only discards, but there is not one for everything.
    """
    if not takes_spans(backend, documents.cu_seqlens.device, dtype, head_dim):
        return documents.bias(dtype)
    # the number of documents differs from batch to batch: compiled code must not be made for one
    torch._dynamo.maybe_mark_dynamic(documents.cu_seqlens, 0)
    return Packed(documents.cu_seqlens, documents.max_length)


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
    """Cosines and sines in the released model's convention: (..., T) -> 2 x (..., T, head_dim), the halves equal."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim)
    angles = positions.to(dtype)[..., None] * frequencies  # (..., T) -> (..., T, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, heads, head_dim) by (T, head_dim) or (B, T, head_dim) angles, in the angles' dtype.

    Halves are paired, not neighbours (LLaMA's rotate_half).
    """
    exact = x.to(cos.dtype)
    first, second = exact.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (exact * cos[..., None, :] + rotated * sin[..., None, :]).to(x.dtype)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V with a causal mask; names as in the released state dict, no biases.

    `backend` is one of `moe.kernels.attention`; caches and biases are left to torch's.
    """

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.head_dim, self.backend = config.head_dim, backend
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(query_width, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, mask: Mask = None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rotary(self.q_proj(x).view(heads), cos, sin)
        k = apply_rotary(self.k_proj(x).view(heads), cos, sin)
        v = self.v_proj(x).view(heads)
        return self.o_proj(self._mix(q, k, v, cache, mask).flatten(2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, mask: Mask) -> Tensor:
        """(B, T, heads, D) x (B, T, kv_heads, D) -> (B, T, heads, D)."""
        if isinstance(mask, Packed):
            tokens = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
            return span_attention(*tokens, mask.cu_seqlens, mask.max_length, self.backend).view(q.shape)
        if cache is None and mask is None:
            return row_attention(q, k, v, self.backend)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return masked_attention(q, k, v, mask).transpose(1, 2)
