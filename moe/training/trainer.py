"""The step: what the paper's appendix A does to the parameters once per global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data import Batch
from moe.config.schema import Config
from moe.model import LossSums, RoutingStats, Transformer
from moe.parallel import World, mark_last_micro_batch, sum_token_gradients
from moe.telemetry.accumulator import MetricAccumulator, StepSums
from moe.training.forward import forward
from moe.training.guard import StepGuard
from moe.training.optimizer import build_optimizer, clipping_scale, gradient_norm, learning_rate, optimizer_tensors
from moe.training.signals import StopSignal


class Trainer:
    """Model, optimizer, guard and accumulated metrics of a run, and the step that advances them.

    Nothing in `step` waits for the device; `fetch_metrics` does.
    """

    def __init__(self, model: Transformer, config: Config, world: World, num_languages: int, stop: StopSignal) -> None:
        self.model, self.config, self.world, self.stop = model, config, world, stop
        self.optimizer = build_optimizer(model, config.optim)
        self.guard = StepGuard(config.train.guard, world.device)
        self.mixtures = model.moe_blocks()
        num_experts = model.config.n_routed_experts if self.mixtures else 0
        self.sums = StepSums(num_languages, len(self.mixtures), num_experts, world.device)
        self.metrics = MetricAccumulator(self.sums)

    def step(self, step: int, micro_batches: list[Batch]) -> None:
        """One optimizer step, the `step`-th from 0, on this rank's share of the global batch."""
        self.sums.clear()
        num_labels, num_tokens = self._count(micro_batches)
        for index, batch in enumerate(micro_batches):
            mark_last_micro_batch(self.model, index == len(micro_batches) - 1, self.config.parallel.reshard)
            self._forward_backward(batch.to(self.world.device, non_blocking=True), num_labels, num_tokens)
        self.world.sum(self.sums.packed)
        self._update(step, num_labels)

    def _count(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """Labels and tokens of the whole global batch, on the device, before any backward pass."""
        counts = [
            self.world.once(sum(b.num_labels() for b in micro_batches), 0),
            self.world.once(sum(b.num_tokens() for b in micro_batches), 0),
            self.stop.value(),
        ]
        totals = torch.tensor([float(count) for count in counts], dtype=torch.float64)
        if self.world.device.type == "cuda":
            totals = totals.pin_memory().to(self.world.device, non_blocking=True)
        self.world.sum(totals)
        self.stop.observe(totals[2])
        return totals[0], totals[1]

    def _forward_backward(self, batch: Batch, num_labels: Tensor, num_tokens: Tensor) -> None:
        """Add one micro-batch's gradients: its cross-entropy over all labels of the step, its balance losses over all
        tokens."""
        output = forward(self.model, batch)
        assert output.loss is not None
        loss = output.loss.total / num_labels
        if output.routing:
            loss = loss + balance_sum(output.routing) / num_tokens
        loss.backward()
        # ranks that share a sequence know its whole loss, but only their own tokens' routing
        counted = self.world.once(output.loss, LossSums(*map(torch.zeros_like, output.loss)))
        self.sums.add(counted, output.routing)

    def _update(self, step: int, num_labels: Tensor) -> None:
        """Clip, judge, and let AdamW and the routers' biases move if the step counts."""
        optim = self.config.optim
        sum_token_gradients(self.model, self.world)
        norm = gradient_norm(self.model, self.world)
        keep = self.guard.judge(self.sums.cross_entropy / num_labels, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.train.steps, optim.lr, optim.schedule)
        self.optimizer.grad_scale = clipping_scale(norm, optim.max_grad_norm)
        self.optimizer.found_inf = 1 - keep
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.mixtures and self.model.config.bias_update_speed > 0:
            for mixture, counts in zip(self.mixtures, self.sums.counts.sum(dim=1), strict=True):
                mixture.gate.update_bias(counts, keep)  # type: ignore[operator]
        self.metrics.add_step(norm, keep)

    def state_tensors(self) -> dict[str, Any]:
        """Everything on the device that a resumed run needs, as live tensors to save or to load into."""
        return {
            "model": {name: value.detach() for name, value in self.model.state_dict().items()},
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "guard": self.guard.state_tensors(),
            "metrics": self.metrics.state_tensors(),
        }


def balance_sum(routing: list[RoutingStats]) -> Tensor:
    """All balance terms of all layers: each layer counts fully, as in the released code."""
    return torch.stack([s.expert_balance + s.device_balance + s.z_loss for s in routing]).sum()


@contextmanager
def forbid_sync(device: torch.device, active: bool) -> Iterator[None]:
    """Make CUDA raise where the host would wait for the device."""
    if not (active and device.type == "cuda"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
