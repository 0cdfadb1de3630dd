"""float32 products of bfloat16 activations with float32 weights, on bfloat16 tensor cores: the router's.

A float32 is the sum of three bfloat16s (8 bits of significand each), and a product of two bfloat16s is exact in
float32. So the logits are the sum of three products on tensor cores, as accurate as one in float32 without them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def router_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, H) by the transpose of weight (E, H) float32 -> (N, E) in float32, or in fp64 where x is."""
    if x.dtype == torch.bfloat16 and x.device.type == "cuda":
        return _split_product(x, weight)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))


@torch.library.custom_op("moesaic::router_product", mutates_args=())
def _split_product(x: Tensor, weight: Tensor) -> Tensor:
    rows = _padded(weight)
    product = _matmul(x, torch.cat(_parts(rows, 3)).t())
    return product.unflatten(1, (3, len(rows))).sum(1)[:, : len(weight)].contiguous()


@torch.library.custom_op("moesaic::router_product_backward", mutates_args=())
def _split_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of x in its own precision, of weight in float32."""
    grad, rows = F.pad(grad, (0, -grad.shape[1] % 8)), _padded(weight)
    high, middle, low = _parts(grad, 3)
    of_weight = _matmul(torch.cat((high, middle, low), 1).t(), x).unflatten(0, (3, len(rows))).sum(0)
    # 16 bits of either factor: the result is rounded to 8
    first, second = _parts(rows, 2)
    of_x = torch.cat((high, middle, high), 1) @ torch.cat((first, first, second))
    return of_x, of_weight[: len(weight)].contiguous()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Of bfloat16s, in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else a.float() @ b.float()


def _padded(weight: Tensor) -> Tensor:
    """(E, H) with zero rows up to a multiple of 8, which aligned loads want."""
    return F.pad(weight, (0, 0, 0, -len(weight) % 8))


def _parts(x: Tensor, number: int) -> list[Tensor]:
    """bfloat16s that sum up to x."""
    parts = []
    for _ in range(number):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts


@_split_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(x.shape[0], weight.shape[0])


@_split_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _split_backward(grad, *ctx.saved_tensors)


_split_product.register_autograd(_backward, setup_context=_keep)
