"""Turns fetched sums into the rows of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data import BatchSizes
from moe.model import Transformer
from moe.parallel import World
from moe.telemetry import expert_statistics
from moe.telemetry.hardware import peak_memory_gib, peak_tflops
from moe.training.trainer import Trainer


class Stopwatch:
    """Training time, over all the processes that worked on a run; validation and saving at the end do not count."""

    def __init__(self) -> None:
        self.total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> float:
        """Seconds so far."""
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        return self.total + running

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.total, self._since = self.read(), None
        yield
        self.start()


class RowWriter:
    """Builds one row a log step; keeps the clock that speeds are measured by."""

    def __init__(self, trainer: Trainer, world: World, languages: tuple[str, ...], batch_sizes: BatchSizes) -> None:
        self.trainer, self.world, self.languages = trainer, world, languages
        config = trainer.config
        self.batch_sizes, self.seq_len = batch_sizes, config.data.seq_len
        self.flops_per_token = trainer.model.config.flops_per_token(config.data.seq_len)
        self.peak = config.telemetry.peak_tflops or peak_tflops(world.device, config.train.compute_dtype)
        self.stopwatch = Stopwatch()
        self._last = (0, 0.0)

    def resume(self, step: int, seconds: float) -> None:
        """Go on from `seconds` of training that led to `step`."""
        self.stopwatch.total = seconds
        self._last = (step, seconds)

    def tokens(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        return self.batch_sizes.first_sequence(step) * self.seq_len

    def build(self, step: int) -> dict[str, Any]:
        """The row of `step` finished steps. Waits for the device; raises NumericalAbort when skips pile up."""
        sums, (accepted, skipped, norms, consecutive) = self.trainer.metrics.fetch(self.trainer.guard.consecutive_skips)
        row: dict[str, Any] = {"step": step, "tokens": self.tokens(step)}
        row |= self._losses(sums[0], sums[1])
        row |= {"lr": self.trainer.optimizer.param_groups[0]["lr"], "grad_norm": norms / accepted if accepted else None}
        row |= self._balance(sums, accepted) | {"skipped_steps": int(skipped)} | self._speed(step)
        if self.trainer.mixtures and accepted:
            row["experts"] = self._experts(sums[3], sums[4])
        self.trainer.guard.raise_if_stuck(int(consecutive), step)
        return row

    def _losses(self, cross_entropy: Any, labels: Any) -> dict[str, Any]:
        by_language = {
            language: (nats / count).item()
            for language, nats, count in zip(self.languages, cross_entropy, labels, strict=True)
            if count > 0
        }
        total = labels.sum()
        return {"loss": (cross_entropy.sum() / total).item() if total > 0 else None, "loss_by_language": by_language}

    def _balance(self, sums: list[Any], accepted: float) -> dict[str, Any]:
        """Each term as the mean over layers and tokens, so that uniform routing shows its alpha."""
        model: Transformer = self.trainer.model
        if not self.trainer.mixtures or not accepted:
            return {}
        names = ("expert_balance_loss", "device_balance_loss", "router_z_loss")
        factors = (model.config.aux_loss_alpha, model.config.device_aux_loss_alpha, model.config.router_z_loss_alpha)
        means = (sums[2] / (self._routed_tokens(sums[4]) * len(self.trainer.mixtures))).tolist()
        return {name: mean for name, mean, factor in zip(names, means, factors, strict=True) if factor > 0}

    def _routed_tokens(self, counts: Any) -> float:
        """Tokens of the accepted steps, padding left out: every one counts once for each of its experts."""
        return counts[0].sum().item() / self.trainer.model.config.num_experts_per_tok

    def _speed(self, step: int) -> dict[str, Any]:
        seconds = self.stopwatch.read()
        last_step, last_seconds = self._last
        self._last = (step, seconds)
        rate = (self.tokens(step) - self.tokens(last_step)) / max(seconds - last_seconds, 1e-9)
        tflops = rate * self.flops_per_token / 1e12
        return {
            "tokens_per_second": rate,
            "tflops": tflops,
            "mfu": tflops / (self.peak * self.world.size) if self.peak else None,
            "memory_gib": peak_memory_gib(self.world.device),
            "elapsed_seconds": seconds,
        }

    def _experts(self, entropies: Any, counts: Any) -> list[dict[str, Any]]:
        entropy = (entropies / self._routed_tokens(counts)).numpy()
        return expert_statistics(counts.numpy(), entropy, self.trainer.model.config.moe_layers, self.languages)
