"""Matrix products of half precision on processors that have no instructions for them.

Torch multiplies bfloat16 there one number at a time, ten to a hundred times slower than float32 (an x86 without
AVX-512). Such products are taken in float32 and rounded once, as those of other processors are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def in_float32(x: Tensor) -> bool:
    """Whether products with `x` are better taken in float32."""
    return x.device.type == "cpu" and x.dtype.itemsize == 2 and not _multiplies_halves()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., H) by the transpose of weight (O, H) -> (..., O), all in the dtype of x."""
    return F.linear(x.float(), weight.float()).to(x.dtype) if in_float32(x) else F.linear(x, weight)


@torch.compiler.assume_constant_result
def _multiplies_halves() -> bool:
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
