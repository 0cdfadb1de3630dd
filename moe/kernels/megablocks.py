"""MegaBlocks (https://github.com/databricks/megablocks, version 0.10.0) as an expert backend, on today's torch.

MegaBlocks needs seven functions of its CUDA extension `megablocks_ops` and the package `grouped_gemm`. Where those are
not compiled, `load` provides torch equivalents of the same contracts; the rest (Triton gather and scatter, the
memory-optimised gated MLP) is MegaBlocks' own. None of the stand-ins waits for the device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MISSING = "expert backend 'megablocks' is not installed: run launch/install_gpu.sh"


def is_installed() -> bool:
    """Whether MegaBlocks and the packages that it imports are there. Imports nothing."""
    return all(importlib.util.find_spec(name) is not None for name in ("megablocks", "stk", "triton"))


@functools.cache
def load() -> SimpleNamespace:
    """Import MegaBlocks, with torch stand-ins for compiled modules that are missing or do not load.

    Returns its `ops` module, its memory-optimised `grouped_glu` function, `compiled_gemm`: whether grouped GEMMs
    run by the compiled package, and the names of the `stand_ins`. Raises ValueError when MegaBlocks is not installed.
    """
    if not is_installed():
        raise ValueError(MISSING)
    stand_ins = [*_provide("megablocks_ops", _megablocks_ops), *_provide("grouped_gemm", _grouped_gemm)]
    glu = importlib.import_module("megablocks.layers.glu")
    compiled_gemm = glu.gg.backend.gmm is not grouped_matmul
    ops = importlib.import_module("megablocks.ops")
    grouped_glu = glu.memory_optimized_grouped_glu
    return SimpleNamespace(ops=ops, grouped_glu=grouped_glu, compiled_gemm=compiled_gemm, stand_ins=stand_ins)


@torch.compiler.disable
def grouped_glu(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """MegaBlocks' gated expert MLP on rows sorted by expert: (N, H) -> (N, H).

    Rows past the last expert's are undefined, in the output and in the gradient of x.
    """
    return _PrivateGradient.apply(_grouped_glu(load(), x, gate_up_proj, down_proj, tokens_per_expert))


@torch.compiler.disable
def dropless_experts(
    x: Tensor, expert_indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor, valid: Tensor | None
) -> Tensor:
    """MegaBlocks' grouped dropless layer: x (T, H), expert_indices and weights (T, K) -> (T, H).

    Padding tokens go to a bin of their own past the last expert. The gradient of `weights` has the precision of x.
    Raises ValueError at 2**31 row elements: MegaBlocks' kernels index with 32 bits.
    """
    (num_tokens, top_k), num_experts = expert_indices.shape, gate_up_proj.shape[0]
    if num_tokens * top_k * x.shape[1] >= 2**31:
        raise ValueError(
            "expert backend 'megablocks' takes fewer than 2**31 tokens x experts per token x hidden size, "
            f"not {num_tokens} x {top_k} x {x.shape[1]}: use smaller micro-batches"
        )
    package = load()
    if valid is not None:
        x, weights = torch.where(valid[:, None], x, 0), torch.where(valid[:, None], weights, 0)
        expert_indices = torch.where(valid[:, None], expert_indices, num_experts)
    experts = expert_indices.flatten().int()
    bin_ids, slots = package.ops.sort(experts, num_experts.bit_length())
    counts = package.ops.histogram(experts, num_experts + 1)
    bins = package.ops.inclusive_cumsum(counts, 0)
    rows = package.ops.gather(x.contiguous(), slots, bin_ids, bins, top_k)  # (T, H) -> (T*K, H)
    rows = _grouped_glu(package, rows, gate_up_proj, down_proj, counts[:num_experts])
    out = package.ops.scatter(rows, slots, bin_ids, weights.flatten(), bins, top_k)  # (T*K, H) -> (T, H)
    return out if valid is None else torch.where(valid[:, None], out, 0)


def _grouped_glu(
    package: SimpleNamespace, x: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor
) -> Tensor:
    gate, up = gate_up.unbind(1)
    # MegaBlocks wants every matrix contiguous, and the down projection as (E, I, H).
    operands = [x, gate, up, down.transpose(1, 2)]
    if torch.is_grad_enabled():
        operands = [_requiring_grad(operand) for operand in operands]
    operands = [operand.contiguous() for operand in operands]
    # The compiled package reads the batch sizes on the host.
    batch_sizes = tokens_per_expert.cpu().long() if package.compiled_gemm else tokens_per_expert
    return package.grouped_glu(*operands, batch_sizes, F.silu)


def _requiring_grad(operand: Tensor) -> Tensor:
    # MegaBlocks' backward pass refuses frozen operands; a detached leaf takes the gradient that nobody asked for.
    return operand if operand.requires_grad else operand.detach().requires_grad_()


class _PrivateGradient(torch.autograd.Function):
    """Identity whose incoming gradient is copied: MegaBlocks overwrites it, and autograd may have shared it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


def _provide(name: str, build_stand_in: Callable[[], ModuleType]) -> list[str]:
    """The functions that had to be stood in for."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = sys.modules[name] = build_stand_in()
        return [f"{name}.{function}" for function in module.__all__]
    return []


def _megablocks_ops() -> ModuleType:
    module = ModuleType("megablocks_ops", "Torch equivalents of MegaBlocks' CUDA extension.")
    functions = (sort, histogram, inclusive_cumsum, exclusive_cumsum, indices, replicate_forward, replicate_backward)
    for function in functions:
        setattr(module, function.__name__, function)
    module.__all__ = [function.__name__ for function in functions]  # type: ignore[attr-defined]
    return module


def _grouped_gemm() -> ModuleType:
    module = ModuleType("grouped_gemm", "Torch equivalent of the grouped_gemm package.")
    namespace = SimpleNamespace(gmm=grouped_matmul)
    module.backend = module.ops = namespace  # type: ignore[attr-defined]
    module.__all__ = [*vars(namespace)]  # type: ignore[attr-defined]
    return module


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Stable sort of x (N,) by its lowest `end_bit` bits into x_out, with the original positions in iota_out."""
    _, order = (x & ((1 << end_bit) - 1)).sort(stable=True)
    torch.index_select(x, 0, order, out=x_out)
    iota_out.copy_(order)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """Count of each integer in [0, num_bins): (N,) -> (num_bins,) or (B, N) -> (B, num_bins), int32."""
    in_range = (x >= 0) & (x < num_bins)
    counts = x.new_zeros((*x.shape[:-1], num_bins), dtype=torch.int32)
    return counts.scatter_add_(-1, x.clamp(0, num_bins - 1).long(), in_range.int())


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum of x along `dim`, into out."""
    torch.cumsum(x, dim, dtype=x.dtype, out=out)


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Running sum of x along `dim` without the element itself, into out."""
    out.copy_(x.cumsum(dim, dtype=x.dtype) - x)


def indices(padded_bins: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor) -> None:
    """Column of every nonzero block of a block-diagonal matrix, row by row, into out (rows * columns,) int16.

    Bin b ends at row padded_bins[b], a multiple of `block_size`, and owns block columns [b, b + 1) * block_columns.
    """
    rows = torch.arange(block_rows, device=out.device)
    bin_of_row = torch.searchsorted(padded_bins // block_size, rows, right=True)
    columns = torch.arange(block_columns, device=out.device)
    out.copy_((bin_of_row[:, None] * block_columns + columns).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Write x[:, b] to the columns of bin b, which ends at bins[b]: (B, E) -> out (B, N). Later columns keep theirs."""
    columns = torch.arange(out.shape[1], device=out.device)
    bin_of_column = torch.searchsorted(bins, columns, right=True).clamp(max=bins.shape[0] - 1)
    out.copy_(torch.where(columns < bins[-1], x[:, bin_of_column], out))


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """Sum grad (B, N) over the columns of each bin, which ends at bins[b], into out (B, E)."""
    offsets = torch.cat([bins.new_zeros(1), bins])
    out.copy_(torch.segment_reduce(grad.T.float().contiguous(), "sum", offsets=offsets, axis=0).T)


def grouped_matmul(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None
) -> Tensor:
    """Product of each group of rows with its own matrix, into c where given.

    a (N, K) with b (E, K, M), or (E, M, K) under `trans_b` -> (N, M); under `trans_a` the weight gradient a (N, K),
    b (N, M) -> (E, K, M). Rows past the sum of `batch_sizes` (E,) are undefined.
    """
    ends = batch_sizes.to(a.device).cumsum(0, dtype=torch.int32)
    product = F.grouped_mm(a.T if trans_a else a, b.transpose(-2, -1) if trans_b else b, offs=ends)
    return product if c is None else c.copy_(product)
