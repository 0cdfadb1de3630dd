"""Causal attention of whole rows and of spans of tokens, by torch or by a FlashAttention package.

    sdpa            torch's scaled_dot_product_attention, and its variable-length kernel for spans
    flash_attn      FlashAttention-2    }
    flash_attn_3    FlashAttention-3    } by their interface; not measured here
    flash_attn_4    FlashAttention-4 in CuTe, on Hopper

The packages take keys and values of fewer heads than queries as they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from moe.kernels.halves import in_float32

PACKAGES = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
"""Module of each package."""
BACKENDS = ("sdpa", *PACKAGES)
FLASH_4_VERSION = "4.0.0"
"""Its passes are called one by one, which is not a promised interface: other versions are left alone."""

# On Hopper cuDNN's attention is 1.8 times as fast as the flash kernel torch ships (docs/log.md); the others are
# fallbacks.
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def available_backends() -> tuple[str, ...]:
    """Names that `resolve_backend` accepts with the packages installed here. Imports none of them."""
    return tuple(name for name in BACKENDS if _is_installed(name))


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """Turn "auto" into the fastest backend that was measured; check any other name.

    That is FlashAttention-4 on Hopper where installed, else torch's; flash_attn where torch was built without flash
    attention. Raises ValueError for a backend that cannot run here.
    """
    device = torch.device(device)
    if name == "auto":
        return _fastest(device, dtype, head_dim)
    available = ", ".join(("auto", *available_backends()))
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not one of {available}")
    if not _is_installed(name):
        raise ValueError(f"attention backend {name!r} is not installed: run launch/install_gpu.sh; here: {available}")
    if problem := _problem(name, device, dtype, head_dim):
        raise ValueError(f"attention backend {name!r} {problem}")
    return name


def takes_spans(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `span_attention` can run; where not, a mask has to say what is seen."""
    if device.type != "cuda" or not _is_flash_shape(dtype, head_dim):
        return False
    return backend != "sdpa" or torch.backends.cuda.is_flash_attention_available()


def row_attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """(B, T, heads, D) x (B, T, kv_heads, D) -> (B, T, heads, D), causal within each row."""
    if backend == "sdpa":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return masked_attention(q, k, v).transpose(1, 2)
    if backend == "flash_attn_4":
        return flash_4(q, k, v, None, 0, _is_repeatable())[0]
    package: Any = importlib.import_module(PACKAGES[backend])
    return _output(package.flash_attn_func(q, k, v, causal=True, deterministic=_is_repeatable()))


def span_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, backend: str) -> Tensor:
    """(N, heads, D) x (N, kv_heads, D) -> (N, heads, D), causal within each span of the N tokens.

    cu_seqlens (n,) int32 are the bounds of the spans, from 0 to N, which may be repeated; `max_length` is the longest.
    """
    if backend == "sdpa":
        return _torch_spans(q, k, v, cu_seqlens, max_length)
    if backend == "flash_attn_4":
        return flash_4(q, k, v, cu_seqlens, max_length, _is_repeatable())[0]
    package: Any = importlib.import_module(PACKAGES[backend])
    bounds = (cu_seqlens, cu_seqlens, max_length, max_length)
    return _output(package.flash_attn_varlen_func(q, k, v, *bounds, causal=True, deterministic=_is_repeatable()))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, heads, T, D) x (B, kv_heads, S, D) -> (B, heads, T, D); the T queries are the last of the S positions.

    `mask`, broadcast to (B, heads, T, S), is added to the scores, or says which count (default: all that are causal).
    """
    if in_float32(q):
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return masked_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
    queries, keys = q.shape[2], k.shape[2]
    k, v = _one_a_query_head(k, v, q.shape[1], dim=1)
    if mask is None and 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and queries == keys)


@torch.library.custom_op("moesaic::flash_attention_4", mutates_args=())
def flash_4(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_length: int, repeatable: bool
) -> tuple[Tensor, Tensor]:
    """Output and float32 log-sum-exp, (B, heads, T) of rows or (heads, N) of spans; one operator, as no compiler sees
    into CuTe."""
    out, lse = _flash_4()._flash_attn_fwd(q, k, v, causal=True, return_lse=True, **_spans(cu_seqlens, max_length))
    return out, lse


@torch.library.custom_op("moesaic::flash_attention_4_backward", mutates_args=())
def flash_4_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_length: int,
    repeatable: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `flash_4` for q, k and v; `repeatable` adds them up in one order."""
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    names = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    _flash_4()._flash_attn_bwd(
        q, k, v, out, dout.contiguous(), lse, causal=True, deterministic=repeatable, **names,
        **_spans(cu_seqlens, max_length),
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


@flash_4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *rows, tokens, heads = q.shape[:-1]
    return q.new_empty(q.shape), q.new_empty((*rows, heads, tokens), dtype=torch.float32)


@flash_4_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    return *flash_4_backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None


flash_4.register_autograd(_backward, setup_context=_keep)


def _spans(cu_seqlens: Tensor | None, max_length: int) -> dict[str, Any]:
    if cu_seqlens is None:
        return {}
    return {f"cu_seqlens_{x}": cu_seqlens for x in "qk"} | {f"max_seqlen_{x}": max_length for x in "qk"}


def _flash_4() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


def _torch_spans(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k, v = _one_a_query_head(k, v, q.shape[1], dim=1)
    causal = (-1, 0)
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, window_size=causal)
    assert isinstance(out, Tensor)  # nothing beside it was asked for
    return out


def _one_a_query_head(k: Tensor, v: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values repeated along `dim` until there are `heads`."""
    if k.shape[dim] == heads:
        return k, v
    groups = heads // k.shape[dim]
    return k.repeat_interleave(groups, dim=dim), v.repeat_interleave(groups, dim=dim)


def _output(result: Any) -> Tensor:
    """Of packages that may return the log-sum-exp beside it."""
    return result[0] if isinstance(result, tuple) else result


def _is_repeatable() -> bool:
    return torch.are_deterministic_algorithms_enabled()  # torch's own kernels look themselves


def _is_flash_shape(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _problem(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot run."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"runs on CUDA devices only, not on {device.type}"
    if not _is_flash_shape(dtype, head_dim):
        return f"takes bfloat16 or float16 and heads of a multiple of 8 up to 256, not {dtype} and {head_dim}"
    if backend != "flash_attn" and not _is_hopper(device):
        return "runs on Hopper GPUs only"
    if backend == "flash_attn_4" and head_dim > 128:
        return f"takes heads of up to 128 here, not {head_dim}"
    return None


def _fastest(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    flash = "flash_attn_4"
    if device.type == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        flash = "flash_attn"
    return flash if _is_installed(flash) and not _problem(flash, device, dtype, head_dim) else "sdpa"


def _is_installed(backend: str) -> bool:
    if backend == "sdpa":
        return True
    if backend == "flash_attn_3":
        return importlib.util.find_spec(PACKAGES[backend]) is not None
    # both others live below `flash_attn`
    package, version = {"flash_attn": ("flash-attn", "2."), "flash_attn_4": ("flash-attn-4", FLASH_4_VERSION)}[backend]
    try:
        return importlib.metadata.version(package).startswith(version)
    except importlib.metadata.PackageNotFoundError:
        return False
