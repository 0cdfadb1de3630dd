"""Causal self-attention with rotary positions, multi-head or grouped-query, within a row or within documents, and a
key/value cache for generation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

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

PackedKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""Queries, keys and values (tokens, heads, D), bounds of spans (n,), longest span -> (tokens, heads, D)."""


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

    kernel: PackedKernel
    cu_seqlens: Tensor
    max_length: int


Mask = Packed | Tensor | None
"""What a token may see: its span, as bounds or as a bias of all scores, or (None) all before it in its row."""


def document_mask(documents: Documents, head_dim: int, dtype: torch.dtype) -> Packed | Tensor:
    """`documents` for heads of `head_dim` in `dtype`; made once a forward pass, for all layers.

    A packed kernel leaves out the pairs that a bias only discards, but there is not one for everything.
    """
    kernel = packed_kernel(documents.cu_seqlens.device, head_dim, dtype)
    if kernel is None:
        return documents.bias(dtype)
    # the number of documents differs from batch to batch: compiled code must not be made for one
    torch._dynamo.maybe_mark_dynamic(documents.cu_seqlens, 0)
    return Packed(kernel, documents.cu_seqlens, documents.max_length)


def packed_kernel(device: torch.device, head_dim: int, dtype: torch.dtype) -> PackedKernel | None:
    """Torch's own kernel, that of the flash_attn package where torch was built without, or None."""
    takes = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    if device.type != "cuda" or not takes:
        return None
    if torch.backends.cuda.is_flash_attention_available():
        return _torch_varlen
    return _flash_attn_varlen if importlib.util.find_spec("flash_attn") else None


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    causal = (-1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, window_size=causal)
    assert isinstance(out, Tensor)  # nothing beside it was asked for
    return out


def _flash_attn_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    repeatable = torch.are_deterministic_algorithms_enabled()  # torch's own kernel looks itself
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, causal=True, deterministic=repeatable
    )


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, mask: Mask = None) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rotary(self.q_proj(x).view(heads), cos, sin)
        k = apply_rotary(self.k_proj(x).view(heads), cos, sin)
        v = self.v_proj(x).view(heads)
        if isinstance(mask, Packed):
            return self.o_proj(packed_attention(q, k, v, mask).flatten(2))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.o_proj(causal_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, spans: Packed) -> Tensor:
    """(B, T, heads, D) x (B, T, kv_heads, D) -> (B, T, heads, D), causal within each span."""
    k, v = _one_a_query_head(k, v, q.shape[2], dim=2)
    packed = spans.kernel(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), spans.cu_seqlens, spans.max_length)
    return packed.view(q.shape)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, heads, T, D) x (B, kv_heads, S, D) -> (B, heads, T, D); the T queries are the last of the S positions.

    `mask`, broadcast to (B, heads, T, S), is added to the scores, or says which count (default: all that are causal).
    """
    queries, keys = q.shape[2], k.shape[2]
    k, v = _one_a_query_head(k, v, q.shape[1], dim=1)
    if mask is None and 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and queries == keys)


def _one_a_query_head(k: Tensor, v: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values repeated along `dim` until there are `heads`."""
    if k.shape[dim] == heads:
        return k, v
    groups = heads // k.shape[dim]
    return k.repeat_interleave(groups, dim=dim), v.repeat_interleave(groups, dim=dim)
