"""AdamW in one pass over a tensor, in Triton: gradients are clipped as they are read, where torch's fused kernel also
writes them back, and memory is kept busier."""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a program."""


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    corrections: Tensor,
    divisor: Tensor,
    skip: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """A step of `parameter` and its moments, in place; all four float32, contiguous and of one shape (else ValueError).

    On the device, so that the host need not wait: `corrections` (2,) float32, 1 - beta1 ** t and the root of 1 - beta2
    ** t at step t; `divisor` (), which the gradient is divided by; `skip` (), where not 0 nothing is touched.
    """
    tensors = parameter, gradient, exp_avg, exp_avg_sq
    if any(t.dtype != torch.float32 or not t.is_contiguous() or t.shape != parameter.shape for t in tensors):
        given = [(t.dtype, tuple(t.shape), t.stride()) for t in tensors]
        raise ValueError(f"AdamW takes contiguous float32 tensors of one shape, not {given}")
    size = parameter.numel()
    if size:
        _adamw[(triton.cdiv(size, BLOCK),)](
            *tensors, corrections, divisor, skip, size, lr,
            BETA1=betas[0], BETA2=betas[1], EPS=eps, WEIGHT_DECAY=weight_decay, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["corrections"])
def _adamw(parameter, gradient, exp_avg, exp_avg_sq, corrections, divisor, skip, size, lr, BETA1: tl.constexpr,
           BETA2: tl.constexpr, EPS: tl.constexpr, WEIGHT_DECAY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    if tl.load(skip) == 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        rate, scale = lr / tl.load(corrections), 1 / tl.load(corrections + 1)
        grad = tl.load(gradient + at, mask=inside) * (1 / tl.load(divisor))
        first, second = tl.load(exp_avg + at, mask=inside), tl.load(exp_avg_sq + at, mask=inside)
        value = tl.load(parameter + at, mask=inside)
        first += (1 - BETA1) * (grad - first)
        second = BETA2 * second + (1 - BETA2) * grad * grad
        value -= lr * WEIGHT_DECAY * value + rate * first / (tl.sqrt(second) * scale + EPS)
        tl.store(exp_avg + at, first, mask=inside)
        tl.store(exp_avg_sq + at, second, mask=inside)
        tl.store(parameter + at, value, mask=inside)
