"""What happens to rows between grouped matrix products, in Triton: each kernel reads and writes its tensors once.

Rows at and after the last number of `bounds` (n,) int32, on the device, belong to padding: they are not read, and what
would be made for them stays undefined. Operators take `bounds` whole: of a slice of it, which is not aligned, compilers
conclude that neither are the results, and read them piecemeal.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """The rows of the experts, sorted by expert; those after the last expert's belong to padding."""

    bounds: Tensor
    """(E + 1,) int32: expert e has rows bounds[e] to bounds[e + 1]."""
    total: int
    """N, padding included."""
    token: Tensor | None
    """(N,) int32: the token that a row copies; None where rows and tokens are the same."""
    weight: Tensor | None
    """(N,) float32: what the row counts for in its token's sum."""

    @property
    def ends(self) -> Tensor:
        """(E,) int32: where each expert's rows end."""
        return self.bounds[1:]


@torch.library.custom_op("moesaic::sum_rows", mutates_args=())
def sum_rows(rows: Tensor, row_of_slot: Tensor, bounds: Tensor, weights: Tensor | None) -> Tensor:
    """out[t] = sum over k of weights[t, k] * rows[row_of_slot[t, k]]: (N, H), (T, K) -> (T, H) in the dtype of rows.

    Sums are taken in fp32. A slot of padding adds nothing.
    """
    (tokens, top_k), width = row_of_slot.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if not tokens:
        return out
    block = min(triton.next_power_of_2(width), 2048)
    _sum_rows[(tokens, triton.cdiv(width, block))](
        rows, row_of_slot, rows if weights is None else weights, bounds[-1:], out,
        WIDTH=width, TOP_K=top_k, WEIGHTED=weights is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return out


@sum_rows.register_fake
def _(rows: Tensor, row_of_slot: Tensor, bounds: Tensor, weights: Tensor | None) -> Tensor:
    return rows.new_empty(row_of_slot.shape[0], rows.shape[1])


@torch.library.custom_op("moesaic::spread_rows", mutates_args=())
def spread_rows(
    grad: Tensor, rows: Tensor, row_of_slot: Tensor, bounds: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of the weighted `sum_rows`: grad (T, H) -> gradients of rows (N, H) and of weights (T, K)."""
    (tokens, top_k), width = row_of_slot.shape, rows.shape[1]
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    if not tokens:
        return grad_rows, grad_weights
    block = triton.next_power_of_2(width)
    _spread_rows[(tokens,)](
        grad, rows, row_of_slot, bounds[-1:], weights, grad_rows, grad_weights,
        WIDTH=width, TOP_K=top_k, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return grad_rows, grad_weights


@spread_rows.register_fake
def _(grad: Tensor, rows: Tensor, row_of_slot: Tensor, bounds: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weights)


def swiglu_backward(h: Tensor, da: Tensor, weight: Tensor | None, bounds: Tensor) -> Tensor:
    """Backward of a = weight * silu(gate) * up, with h (N, 2 I) the gate beside the up projection, in place.

    `da` (N, I) is the gradient of a / weight, `weight` (N,) float32. Overwrites h with its gradient and da with a.
    Returns the gradient of weight (N,) float32, empty without one.
    """
    rows, width = da.shape
    dweight = torch.empty(rows if weight is not None else 0, dtype=torch.float32, device=h.device)
    if not rows:
        return dweight
    block = min(triton.next_power_of_2(width), 512)
    _swiglu_backward[(rows,)](
        h, da, h if weight is None else weight, bounds[-1:], dweight, WIDTH=width, WEIGHTED=weight is not None,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return dweight


def _warps(block: int) -> int:
    """Sixteen bytes for every thread to load."""
    return max(1, min(8, block // 256))


@triton.jit
def _sum_rows(rows, row_of_slot, weights, end, out, WIDTH: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(end)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_slot + token * TOP_K + k).to(tl.int64)
        here = columns < tl.where(row < used, WIDTH, 0)
        block = tl.load(rows + row * WIDTH + columns, mask=here, other=0).to(tl.float32)
        if WEIGHTED:
            # a select: a weight of padding may be anything
            block = tl.where(here, block * tl.load(weights + token * TOP_K + k).to(tl.float32), 0)
        acc += block
    tl.store(out + token * WIDTH + columns, acc.to(out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _spread_rows(grad, rows, row_of_slot, end, weights, grad_rows, grad_weights, WIDTH: tl.constexpr,
                 TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    used = tl.load(end)
    own = tl.load(grad + token * WIDTH + columns, mask=columns < WIDTH, other=0).to(tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        row = tl.load(row_of_slot + slot).to(tl.int64)
        here = columns < tl.where(row < used, WIDTH, 0)
        value = tl.load(rows + row * WIDTH + columns, mask=here, other=0).to(tl.float32)
        tl.store(grad_weights + slot, tl.sum(tl.where(here, own * value, 0)).to(grad_weights.dtype.element_ty))
        spread = own * tl.load(weights + slot).to(tl.float32)
        tl.store(grad_rows + row * WIDTH + columns, spread.to(grad_rows.dtype.element_ty), mask=here)


@triton.jit
def _swiglu_backward(h, da, weight, end, dweight, WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end):
        scale = tl.load(weight + row).to(tl.float32) if WEIGHTED else 1.0
        product = tl.zeros((BLOCK,), tl.float32)
        for start in tl.static_range(0, WIDTH, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < WIDTH
            at_gate, at = h + row * 2 * WIDTH + columns, da + row * WIDTH + columns
            gate = tl.load(at_gate, mask=inside, other=0).to(tl.float32)
            up = tl.load(at_gate + WIDTH, mask=inside, other=0).to(tl.float32)
            grad = tl.load(at, mask=inside, other=0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            product += grad * silu * up
            grad *= scale
            tl.store(at_gate, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(h.dtype.element_ty), mask=inside)
            tl.store(at_gate + WIDTH, (grad * silu).to(h.dtype.element_ty), mask=inside)
            tl.store(at, (scale * silu * up).to(da.dtype.element_ty), mask=inside)
        if WEIGHTED:
            tl.store(dweight + row, tl.sum(product))
