"""Checks of a composed configuration that types cannot state; each ends in one line naming the key."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from moe.config.errors import ConfigError, choice, require
from moe.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    RuntimeConfig,
    TelemetryConfig,
    TrainConfig,
)


def validate(config: Config) -> None:
    """Raise ConfigError on the first impossible value or combination, before any work."""
    _check_finite("", dataclasses.asdict(config))
    _check_names(config)
    model = config.model.build()
    _check_data(config.data)
    _check_train(config.train)
    _check_optim(config.optim, config.train.steps)
    _check_parallel(config.parallel)
    _check_runtime(config.runtime)
    _check_checkpoint(config.checkpoint)
    _check_telemetry(config.telemetry)
    limit = model.max_position_embeddings
    require(
        config.data.seq_len <= limit,
        "data.seq_len",
        f"at most model.max_position_embeddings={limit}",
        config.data.seq_len,
    )


def _check_finite(prefix: str, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check_finite(f"{prefix}{key}.", value)
        elif isinstance(value, float):
            require(math.isfinite(value), prefix + key, "finite", value)


def _check_names(config: Config) -> None:
    for key in ("name", "run"):
        value = getattr(config, key)
        plain = value is None or (value == Path(value).name and value not in ("", ".", ".."))
        require(plain, key, "a plain folder name", value)


def _check_data(data: DataConfig) -> None:
    require(data.seq_len >= 2, "data.seq_len", "at least 2", data.seq_len)
    require(data.prefetch >= 1, "data.prefetch", "at least 1", data.prefetch)
    choice("data.mode", data.mode, ("tokens", "text"))
    if data.prepared is None or data.mode == "text":
        if not data.sources:
            raise ConfigError(
                "data.prepared must name a folder that `python -m data.prepare` wrote, or data.sources files"
            )
        if not data.tokenizer:
            raise ConfigError(
                "data.tokenizer must name a tokenizer.json; `python -m data.tokenizer` trains or imports one"
            )
    require(data.prefetch <= 1024, "data.prefetch", "at most 1024", data.prefetch)
    require(0 <= data.workers <= 256, "data.workers", "between 0 and 256", data.workers)
    require(1 <= data.streams <= 65536, "data.streams", "between 1 and 65536", data.streams)
    require(data.validation_tokens >= 0, "data.validation_tokens", "at least 0", data.validation_tokens)
    choice("data.shuffle", data.shuffle, ("windowed", "full"))
    choice("data.packing", data.packing, ("chunk", "best_fit"))
    if data.mode == "text" and data.packing != "chunk":
        raise ConfigError("data.packing=best_fit needs all documents' lengths beforehand: use data.mode=tokens")
    for name, source in data.sources.items():
        require(0 <= source.weight < math.inf, f"data.sources.{name}.weight", "at least 0 and finite", source.weight)
    weights = {"data.weights": data.weights}
    weights |= {f"data.stages[{number}].weights": stage.weights for number, stage in enumerate(data.stages)}
    for where, shares in weights.items():
        for name, weight in shares.items():
            require(0 <= weight < math.inf, f"{where}.{name}", "at least 0 and finite", weight)
        require(not shares or any(shares.values()), where, "above 0 for a source", dict(shares))
    steps = [0, *(stage.start_step for stage in data.stages)]
    require(_rising(steps), "data.stages", "rising in start_step, from 1 on", steps[1:])
    for pair in data.skip_ranges:
        require(len(pair) == 2, "data.skip_ranges", "pairs [first, end)", pair)
    bounds = [bound for pair in data.skip_ranges for bound in pair]
    require(_rising([-1, *bounds]), "data.skip_ranges", "rising ranges [first, end) that do not touch", bounds)


def _rising(values: list[int]) -> bool:
    return all(before < after for before, after in zip(values, values[1:], strict=False))


def _check_optim(optim: OptimConfig, steps: int) -> None:
    schedule = optim.schedule
    choice("optim.schedule.shape", schedule.shape, ("multistep", "cosine", "constant", "wsd"))
    for key in ("lr", "eps", "max_grad_norm"):
        require(getattr(optim, key) > 0, f"optim.{key}", "above 0", getattr(optim, key))
    for key in ("beta1", "beta2"):
        require(0 <= getattr(optim, key) < 1, f"optim.{key}", "in [0, 1)", getattr(optim, key))
    require(optim.weight_decay >= 0, "optim.weight_decay", "at least 0", optim.weight_decay)
    require(
        0 <= schedule.warmup_steps <= steps,
        "optim.schedule.warmup_steps",
        f"between 0 and train.steps={steps}",
        schedule.warmup_steps,
    )
    rising = sorted(schedule.milestones) == list(schedule.milestones) and all(0 < m < 1 for m in schedule.milestones)
    require(rising, "optim.schedule.milestones", "rising fractions in (0, 1)", schedule.milestones)
    require(schedule.factor > 0, "optim.schedule.factor", "above 0", schedule.factor)
    for key in ("final_ratio", "decay_fraction"):
        require(0 <= getattr(schedule, key) <= 1, f"optim.schedule.{key}", "in [0, 1]", getattr(schedule, key))


def _check_train(train: TrainConfig) -> None:
    for key in ("steps", "global_batch_size", "micro_batch_size", "log_interval"):
        require(getattr(train, key) >= 1, f"train.{key}", "at least 1", getattr(train, key))
    require(train.eval_interval >= 0, "train.eval_interval", "at least 0", train.eval_interval)
    require(0 <= train.seed < 2**63, "train.seed", "between 0 and 2^63 - 1", train.seed)
    require(train.steps <= 10**12, "train.steps", "at most 10^12", train.steps)
    choice("train.compute_dtype", train.compute_dtype, ("float32", "bfloat16"))
    divides = train.global_batch_size % train.micro_batch_size == 0
    require(
        divides,
        "train.micro_batch_size",
        f"a divisor of train.global_batch_size={train.global_batch_size}",
        train.micro_batch_size,
    )
    for pair in train.batch_ramp:
        require(len(pair) == 2, "train.batch_ramp", "pairs [end, size]", pair)
        fits = pair[1] >= 1 and pair[1] % train.micro_batch_size == 0
        require(
            fits, "train.batch_ramp", f"of sizes that train.micro_batch_size={train.micro_batch_size} divides", pair
        )
    require(_rising([0, *(end for end, _ in train.batch_ramp)]), "train.batch_ramp", "rising", train.batch_ramp)
    guard = train.guard
    require(guard.spike_threshold >= 0, "train.guard.spike_threshold", "at least 0", guard.spike_threshold)
    require(8 <= guard.window <= 65536, "train.guard.window", "between 8 and 65536", guard.window)
    require(
        guard.max_consecutive_skips >= 1, "train.guard.max_consecutive_skips", "at least 1", guard.max_consecutive_skips
    )


def _check_parallel(parallel: ParallelConfig) -> None:
    axes = ("replicate", "shard", "tensor")
    for key in (*axes, "expert"):
        degree = getattr(parallel, key)
        require(degree is None or 1 <= degree <= 2**20, f"parallel.{key}", "between 1 and 2^20", degree)
    open_axes = [f"parallel.{key}" for key in axes if getattr(parallel, key) is None]
    require(len(open_axes) <= 1, " and ".join(open_axes), "degrees, but for one axis", "null")
    require(1 <= parallel.timeout <= 86_400, "parallel.timeout", "between 1 and 86400 seconds", parallel.timeout)


def _check_runtime(runtime: RuntimeConfig) -> None:
    choice("runtime.activation_checkpointing", runtime.activation_checkpointing, ("none", "selective", "full"))
    choice("runtime.device", runtime.device, ("auto", "cpu", "cuda"))
    choice(
        "runtime.expert_backend",
        runtime.expert_backend,
        ("auto", "loop", "grouped_mm", "triton", "quack", "megablocks"),
    )
    choice(
        "runtime.attention_backend",
        runtime.attention_backend,
        ("auto", "sdpa", "flash_attn", "flash_attn_3", "flash_attn_4"),
    )
    require(0 <= runtime.num_threads <= 1024, "runtime.num_threads", "between 0 and 1024", runtime.num_threads)
    size = runtime.loss_chunk_size
    require(size is None or size >= 1, "runtime.loss_chunk_size", "at least 1", size)


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    require(checkpoint.interval >= 0, "checkpoint.interval", "at least 0", checkpoint.interval)
    require(checkpoint.keep_last >= 1, "checkpoint.keep_last", "at least 1", checkpoint.keep_last)
    require(checkpoint.keep_every >= 0, "checkpoint.keep_every", "at least 0", checkpoint.keep_every)


def _check_telemetry(telemetry: TelemetryConfig) -> None:
    choice("telemetry.wandb", telemetry.wandb, ("online", "offline", "disabled"))
    peak = telemetry.peak_tflops
    require(peak is None or peak > 0, "telemetry.peak_tflops", "null or above 0", peak)
