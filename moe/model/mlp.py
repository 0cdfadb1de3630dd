"""The linear layer, and the SwiGLU feed-forward network: a dense layer's FFN, and the shared experts fused into one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels.halves import linear


class Linear(nn.Linear):
    """Without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). K_s shared experts of width I are one MLP of width K_s I: their sum."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return self.down(*self.gate_up(x))

    def gate_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) -> gate and up, (..., I) each: the first half, so that the halves can be done at different times."""
        return self.gate_proj(x), self.up_proj(x)

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """The second half: (..., I) each -> (..., H)."""
        return self.down_proj(F.silu(gate) * up)
