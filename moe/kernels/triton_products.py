"""Grouped products for `moe.kernels.fused`: the first one our own, with gather and SwiGLU inside; the others torch's.

torch's grouped_mm is as fast on plain rows as our own product was, and its weight gradients are faster than with the
gather inside (docs/performance.md), so in the backward pass rows are gathered for it.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.rows import Rows, swiglu_backward
from moe.kernels.up_projection import up_projection


def up(x: Tensor, rows: Rows, w1: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, H) by w1 (E, 2, I, H) -> h: gate beside up (N, 2 I), and silu(gate) * up (N, I)."""
    return up_projection(x, rows.token, w1, rows.ends, rows.total)


def down(a: Tensor, rows: Rows, w2: Tensor) -> Tensor:
    """a (N, I) by w2 (E, H, I) -> (N, H)."""
    return F.grouped_mm(a, w2.transpose(1, 2), offs=rows.ends)


def backward(
    dy: Tensor, h: Tensor, x: Tensor, rows: Rows, w1: Tensor, w2: Tensor, sums: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """dy (T, H), the gradient of the weighted sums -> those of the rows of x (N, H), of their weights (N,) where they
    have any, of w1 and of w2; with float32 `sums` these two are added to them instead. Overwrites h."""
    dy = _gather(dy, rows)
    a = F.grouped_mm(dy, w2, offs=rows.ends)  # its gradient, which the next line turns into a times the weight
    dweight = swiglu_backward(h, a, rows.weight, rows.bounds)  # h is its own gradient from here on
    dw2 = F.grouped_mm(dy.t(), a, offs=rows.ends)
    del dy, a
    dw1 = F.grouped_mm(h.t(), _gather(x, rows), offs=rows.ends).view_as(w1)
    if sums:
        _add_to(sums[0], dw1)
        _add_to(sums[1], dw2)
    return F.grouped_mm(h, w1.flatten(1, 2), offs=rows.ends), dweight, dw1, dw2


def _gather(x: Tensor, rows: Rows) -> Tensor:
    """(T, H) -> (N, H)."""
    return x if rows.token is None else x.index_select(0, rows.token)


def _add_to(total: Tensor, part: Tensor) -> None:
    """At the memory's bandwidth, which torch's own addition of two dtypes does not reach."""
    block = 1024
    _add[(triton.cdiv(part.numel(), block),)](total, part, part.numel(), BLOCK=block)


@triton.jit
def _add(total, part, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    added = tl.load(total + at, mask=inside, other=0) + tl.load(part + at, mask=inside, other=0).to(tl.float32)
    tl.store(total + at, added, mask=inside)
