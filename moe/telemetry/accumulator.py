"""Sums of what a run wants to log, kept on the device and fetched in one copy at log rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.model import LossSums, RoutingStats


class StepSums:
    """What one optimizer step adds up over its micro-batches and ranks, packed in one tensor so that one all-reduce
    serves all.

    Layout: cross-entropy and labels by language, the three balance terms, one entropy a MoE layer, then the expert
    counts.
    """

    def __init__(self, num_languages: int, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.sizes = [num_languages, num_languages, 3, num_layers, num_layers * num_languages * num_experts]
        self.counts_shape = (num_layers, num_languages, num_experts)
        # float64 keeps counts exact far beyond 2^24 tokens a step
        self.packed = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)

    def clear(self) -> None:
        self.packed.zero_()

    @torch.no_grad()
    def add(self, loss: LossSums, routing: list[RoutingStats]) -> None:
        """Add one micro-batch."""
        parts = [loss.cross_entropy, loss.labels]
        if routing:
            terms = [(s.expert_balance, s.device_balance, s.z_loss, s.entropy) for s in routing]
            stacked = torch.stack([torch.stack(row) for row in terms], dim=1)  # (4, layers)
            parts += [stacked[:3].sum(dim=1), stacked[3], torch.stack([s.counts for s in routing]).flatten()]
        else:
            parts.append(torch.zeros(3, device=self.packed.device))
        self.packed += torch.cat([part.detach().double() for part in parts])

    @property
    def cross_entropy(self) -> Tensor:
        """() over all languages."""
        return self.unpack(self.packed)[0].sum()

    @property
    def counts(self) -> Tensor:
        """(layers, languages, E)."""
        return self.unpack(self.packed)[4]

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """[cross-entropy (languages,), labels (languages,), balance terms (3,), entropies (layers,), counts]."""
        *sums, counts = packed.split(self.sizes)
        return [*sums, counts.view(self.counts_shape)]


class MetricAccumulator:
    """Sums of the steps since the last log row. Skipped steps only add to the count of skips."""

    def __init__(self, step_sums: StepSums) -> None:
        device = step_sums.packed.device
        self.step_sums = step_sums
        self.packed = torch.zeros_like(step_sums.packed)
        self.scalars = torch.zeros(3, dtype=torch.float64, device=device)
        """Accepted steps, skipped steps, sum of gradient norms."""

    @torch.no_grad()
    def add_step(self, grad_norm: Tensor, keep: Tensor) -> None:
        """Take over the finished step; `keep` is 1 or 0."""
        self.packed += torch.where(keep > 0, self.step_sums.packed, 0.0)
        norm = torch.where(keep > 0, grad_norm, 0.0)
        self.scalars += torch.stack([keep, 1 - keep, norm]).double()

    def fetch(self, consecutive_skips: Tensor) -> tuple[list[Tensor], list[float]]:
        """The sums as `StepSums.unpack` gives them and [accepted, skipped, norm sum, consecutive skips], then start
        over.

        The one place where the host waits for the device.
        """
        everything = torch.cat([self.packed, self.scalars, consecutive_skips.double()[None]]).cpu()
        self.packed.zero_()
        self.scalars.zero_()
        return self.step_sums.unpack(everything[:-4]), everything[-4:].tolist()

    def state_tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed, "scalars": self.scalars}
