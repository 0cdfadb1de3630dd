"""Decides on the device whether a step counts. The host learns of it at the next log row."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.config.schema import GuardConfig

_MAD_TO_SIGMA = 1.4826
# of the loss and of the gradient norm, whose spread a short window underestimates
_RELATIVE_FLOORS = (0.02, 0.1)


class NumericalAbort(RuntimeError):
    """Too many steps in a row were skipped; the message says where."""


class StepGuard:
    """Refuses steps whose loss or gradient norm is not finite or is a spike against the recent accepted ones.

    A spike lies more than `spike_threshold` robust standard deviations above the median of the last `window` accepted
    steps: 1.4826 times the median absolute deviation, at least 2 % of the median for the loss and 10 % for the norm.
    All state is on the device and in the checkpoint.
    """

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.floors = torch.tensor(_RELATIVE_FLOORS, device=device)[:, None]
        self.history = torch.full((2, config.window), torch.nan, device=device)
        """Loss and gradient norm of the last accepted steps, newest last; NaN where there was none yet."""
        self.consecutive_skips = torch.zeros((), device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() and () float32, equal on all ranks -> () float32: 1 to take the step, 0 to skip it."""
        values = torch.stack([loss.float(), grad_norm.float()])
        accepted = torch.isfinite(values).all()
        if self.config.spike_threshold > 0:
            accepted = accepted & ~self._is_spike(values)
        shifted = torch.cat([self.history[:, 1:], values[:, None]], dim=1)
        self.history.copy_(torch.where(accepted, shifted, self.history))
        self.consecutive_skips.copy_(torch.where(accepted, 0.0, self.consecutive_skips + 1))
        return accepted.float()

    def _is_spike(self, values: Tensor) -> Tensor:
        window_is_full = self.history[:, 0].isfinite().all()
        median = _lower_median(self.history)
        deviation = _MAD_TO_SIGMA * _lower_median((self.history - median).abs())
        deviation = torch.maximum(deviation, self.floors * median.abs())
        return window_is_full & (values[:, None] > median + self.config.spike_threshold * deviation).any()

    def raise_if_stuck(self, consecutive_skips: int, step: int) -> None:
        """Raise NumericalAbort when the run cannot go on; called with the fetched counter at log rows."""
        if consecutive_skips >= self.config.max_consecutive_skips:
            raise NumericalAbort(
                f"step {step}: the last {consecutive_skips} steps were skipped for non-finite or spiking loss or "
                f"gradients (train.guard.max_consecutive_skips={self.config.max_consecutive_skips}); "
                "lower optim.lr or look at the data"
            )

    def state_tensors(self) -> dict[str, Tensor]:
        return {"history": self.history, "consecutive_skips": self.consecutive_skips}


def _lower_median(x: Tensor) -> Tensor:
    """(rows, W) -> (rows, 1); Tensor.median has no deterministic CUDA kernel."""
    return x.sort(dim=1).values[:, (x.shape[1] - 1) // 2, None]
