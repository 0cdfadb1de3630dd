"""The routed experts in their plainest form: the oracle that every fast path is tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_reference(
    x: Tensor, expert_indices: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Sum over a token's experts of weight * down(silu(gate x) * (up x)): arXiv 2401.06066, routed term of equation 9.

    x (T, H), expert_indices and weights (T, K), gate_up_proj (E, 2, I, H), down_proj (E, H, I) -> (T, H).
    Computed and returned in fp64 when x is fp64, else in fp32. Indices outside [0, E) contribute nothing.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weights = x.to(dtype), weights.to(dtype)
    out = torch.zeros_like(x)
    for expert, ((gate, up), down) in enumerate(zip(gate_up_proj.to(dtype), down_proj.to(dtype), strict=True)):
        tokens, choices = (expert_indices == expert).nonzero(as_tuple=True)
        chosen = x[tokens]
        hidden = F.silu(chosen @ gate.T) * (chosen @ up.T)
        out = out.index_add(0, tokens, weights[tokens, choices, None] * (hidden @ down.T))
    return out
