"""The routed experts as one operator forward and one backward, around the fastest grouped products at hand.

    x --gather, W1, SwiGLU--> a (N, I) --W2--> y (N, H) --weighted sum of each token's rows--> (T, H)

Every tensor moves as seldom as the products allow; none is saved but x and the gate and up projections h, and h gives
its memory to its own gradient. The products come from `moe.kernels.triton_products` (Triton and torch) or
`moe.kernels.quack_products` (QuACK); both hold the same three functions.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe.kernels.rows import Rows, sum_rows


@torch.library.custom_op("moesaic::experts", mutates_args=())
def experts(
    x: Tensor,
    weights: Tensor | None,
    token_of_row: Tensor | None,
    weight_of_row: Tensor | None,
    row_of_slot: Tensor | None,
    bounds: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_sum: Tensor | None,
    w2_sum: Tensor | None,
    products: str,
) -> tuple[Tensor, Tensor]:
    """The SwiGLU experts w1 (E, 2, I, H), w2 (E, H, I), expert e on rows bounds[e] to bounds[e + 1].

    With a permutation (see `moe.kernels.permute`), x (T, H) are tokens and so is the result, each the sum of its rows
    times `weights` (T, K); weight_of_row (N,) float32 holds these by row, for the backward pass, and gets no gradient.
    Without, x (N, H) are the rows, and so is the result, undefined after bounds[-1]. Also returns the gate and up
    projections (N, 2 I), for the backward pass. `products`: "triton" or "quack".

    With `w1_sum` and `w2_sum`, float32 tensors of the weights' shapes, the backward pass adds the weights' gradients to
    them, and w1 and w2 get none.
    """
    compute = _products(products)
    rows = Rows(bounds, len(x if token_of_row is None else token_of_row), token_of_row, weight_of_row)
    if not rows.total:
        return torch.zeros_like(x), x.new_empty(0, 2 * w1.shape[2])
    h, a = compute.up(x, rows, w1)
    y = compute.down(a, rows, w2)
    del a
    return (y if row_of_slot is None else sum_rows(y, row_of_slot, bounds, weights)), h


@torch.library.custom_op("moesaic::experts_backward", mutates_args=())
def experts_backward(
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    weights: Tensor | None,
    token_of_row: Tensor | None,
    weight_of_row: Tensor | None,
    row_of_slot: Tensor | None,
    bounds: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_sum: Tensor | None,
    w2_sum: Tensor | None,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `experts` for the rows (N, H) of x, for weights (empty without), w1 and w2 (empty with sums).

    `h` is used up, its memory takes its gradient, and sums are added to. No graph reads either afterwards, so the
    operator does not declare that: compilers would copy them. They drop the operator where neither x nor weights need a
    gradient, and let a second backward pass spoil the sums. Rows are summed outside, so that compiled code has given h
    back by then.
    """
    compute = _products(products)
    rows = Rows(bounds, len(h), token_of_row, weight_of_row)
    sums = None if w1_sum is None or w2_sum is None else (w1_sum, w2_sum)
    if not rows.total:
        no_weights = x.new_empty(0, dtype=torch.float32)
        dweights = torch.zeros_like(no_weights if weights is None else weights)
        dw1, dw2 = (w.new_zeros(_grad_shape(w, w1_sum)) for w in (w1, w2))
        return x.new_empty(0, x.shape[1]), dweights, dw1, dw2
    dx, dweight, dw1, dw2 = compute.backward(dy.contiguous(), h, x, rows, w1, w2, sums)
    if sums:
        dw1, dw2 = w1.new_empty(0), w2.new_empty(0)
    if row_of_slot is None or weights is None:
        return dx, dweight, dw1, dw2
    dweights = torch.where(row_of_slot < bounds[-1], dweight[row_of_slot.clamp(max=rows.total - 1)], 0)
    return dx, dweights.to(weights.dtype), dw1, dw2


def _products(name: str) -> ModuleType:
    # QuACK takes seconds to import, and both may be absent where another backend runs
    return importlib.import_module(f"moe.kernels.{name}_products")


@experts.register_fake
def _(x: Tensor, weights: Tensor | None, token_of_row: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    w1 = rest[3]
    num_rows = x.shape[0] if token_of_row is None else token_of_row.shape[0]
    return torch.empty_like(x), x.new_empty(num_rows, 2 * w1.shape[2])


@experts_backward.register_fake
def _(dy: Tensor, h: Tensor, x: Tensor, weights: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, w1, w2, w1_sum, _, _ = rest
    dweights = x.new_empty(0, dtype=torch.float32) if weights is None else torch.empty_like(weights)
    dw1, dw2 = (w.new_empty(_grad_shape(w, w1_sum)) for w in (w1, w2))
    return x.new_empty(h.shape[0], x.shape[1]), dweights, dw1, dw2


def _grad_shape(weight: Tensor, total: Tensor | None) -> torch.Size:
    return weight.shape if total is None else torch.Size([0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.products = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    h, *inputs = ctx.saved_tensors
    _, weights, _, _, row_of_slot, bounds, _, _, w1_sum, _ = inputs
    if dy is None:
        return (None,) * 11
    dx, dweights, dw1, dw2 = experts_backward(dy, h, *inputs, ctx.products)
    torch.autograd.graph.increment_version(h)  # a second backward pass over the same graph raises
    if row_of_slot is not None:
        dx = sum_rows(dx, row_of_slot, bounds, None)
    of_weights = (dw1, dw2) if w1_sum is None else (None, None)
    return dx, None if weights is None else dweights, *(None,) * 4, *of_weights, *(None,) * 3


experts.register_autograd(_backward, setup_context=_keep)
