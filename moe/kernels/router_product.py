"""float32 products of bfloat16 activations with float32 weights, on bfloat16 tensor cores: the router's.

A float32 is the sum of three bfloat16s (8 bits of significand each), and a product of two bfloat16s is exact in
float32. So the logits are the sum of three products on tensor cores, which err by how these add up: 1.3e-6 of the norm
at 32,768 x 1,280 x 63 on an H200, where a float32 product without them errs by 3.2e-7.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers that a program takes."""


@torch.library.custom_op("moesaic::router_product", mutates_args=())
def router_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, H) bfloat16 by the transpose of weight (E, H) float32 -> (N, E) float32."""
    return _sum_thirds(_matmul(x, _split_rows(weight)[1:].flatten(0, 1).t()), len(weight))


@torch.library.custom_op("moesaic::router_product_backward", mutates_args=())
def _router_product_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of x in its own precision, of weight in float32."""
    by_column, by_row = _split_columns(grad), _split_rows(weight)
    of_weight = _matmul(by_column[:, :3].flatten(1, 2).t(), x).unflatten(0, (3, -1)).sum(0)
    # 16 bits of either factor, since the result is rounded to 8: middle x high + high x high + high x middle
    of_x = by_column[:, 1:].flatten(1, 2) @ by_row[:3].flatten(0, 1)
    return of_x, of_weight[: len(weight)]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Of bfloat16s, in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


def _split_rows(x: Tensor) -> Tensor:
    """x (E, H) float32 -> (4, E', H) bfloat16: its high part twice, the middle one, the low one; the three sum up to x.
    E' is the multiple of 8 that aligned loads want, the rows after E zero."""
    return _split(x, x.new_empty(4, -(-len(x) // 8) * 8, x.shape[1], dtype=torch.bfloat16), 0, is_reversed=False)


def _split_columns(x: Tensor) -> Tensor:
    """x (N, E) float32 -> (N, 4, E') bfloat16, likewise but the low part first and the high one twice at the end."""
    return _split(x, x.new_empty(len(x), 4, -(-x.shape[1] // 8) * 8, dtype=torch.bfloat16), 1, is_reversed=True)


def _split(x: Tensor, out: Tensor, part_dim: int, is_reversed: bool) -> Tensor:
    size = out.numel() // 4
    if size:
        _write_parts[(triton.cdiv(size, BLOCK),)](
            x.contiguous(), out, size, *x.shape, out.shape[2], out.stride(1 - part_dim), out.stride(part_dim),
            REVERSED=is_reversed, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def _sum_thirds(x: Tensor, columns: int) -> Tensor:
    """(N, 3 E') float32 -> (N, columns), the sum of its thirds' leading columns."""
    out = x.new_empty(len(x), columns)
    if out.numel():
        _add_thirds[(triton.cdiv(out.numel(), BLOCK),)](
            x, out, out.numel(), COLUMNS=columns, THIRD=x.shape[1] // 3, BLOCK=BLOCK
        )
    return out


@router_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@_router_product_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _router_product_backward(grad, *ctx.saved_tensors)


router_product.register_autograd(_backward, setup_context=_keep)


@triton.jit
def _write_parts(x, out, size, rows, columns, padded_columns, row_stride, part_stride, REVERSED: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = place // padded_columns, place % padded_columns
    left = tl.load(x + row * columns + column, mask=(row < rows) & (column < columns), other=0).to(tl.float32)
    high = left.to(tl.bfloat16)
    left -= high.to(tl.float32)
    middle = left.to(tl.bfloat16)
    low = (left - middle.to(tl.float32)).to(tl.bfloat16)
    step = -part_stride if REVERSED else part_stride
    at = out + row * row_stride + column + (3 * part_stride if REVERSED else 0)
    tl.store(at, high, mask=place < size)
    tl.store(at + step, high, mask=place < size)
    tl.store(at + 2 * step, middle, mask=place < size)
    tl.store(at + 3 * step, low, mask=place < size)


@triton.jit
def _add_thirds(x, out, size, COLUMNS: tl.constexpr, THIRD: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = x + place // COLUMNS * (3 * THIRD) + place % COLUMNS
    inside = place < size
    total = tl.load(at, mask=inside, other=0) + tl.load(at + THIRD, mask=inside, other=0)
    tl.store(out + place, total + tl.load(at + 2 * THIRD, mask=inside, other=0), mask=inside)
