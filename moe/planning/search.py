"""Every way to run an experiment on so many GPUs, the fastest that fits first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from moe.config import Config, ConfigError, ModelConfig
from moe.parallel.layout import Layout, legal_layouts, resolve
from moe.planning.memory import Memory, memory
from moe.planning.speed import Cluster, step_seconds
from moe.planning.step import Step, step_of

GIB = 2**30
USABLE = 0.92
"""Of a GPU's memory: CUDA and NCCL want some, the allocator cannot use all, and no routing is quite even."""
MICRO_BATCHES = tuple(2**power for power in range(9))
"""Sizes that are tried."""
CHOSEN = ("train.micro_batch_size", "runtime.activation_checkpointing", "parallel.reshard")
"""Keys beside the degrees that are chosen where the command line leaves them open."""


class Candidate(NamedTuple):
    config: Config
    layout: Layout
    step: Step
    memory: Memory
    seconds: dict[str, float]

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    def fits(self, cluster: Cluster) -> bool:
        return self.memory.peak <= USABLE * cluster.gpu.memory_gib * GIB

    def overrides(self) -> list[str]:
        """What to add to train.py's command line."""
        config, layout = self.config, self.layout
        degrees = [f"parallel.{axis}={degree}" for axis, degree in dataclasses.asdict(layout).items()]
        return [
            *degrees,
            f"parallel.reshard={str(config.parallel.reshard).lower()}",
            f"train.micro_batch_size={config.train.micro_batch_size}",
            f"runtime.activation_checkpointing={config.runtime.activation_checkpointing}",
        ]


def ranked(config: Config, fixed: set[str], world_size: int, cluster: Cluster) -> list[Candidate]:
    """The best candidate of every legal layout: those that fit first, by predicted time; the others by memory.

    `fixed`: keys that are not to be chosen. Tensor parallelism across nodes is left out unless it is asked for.

    Raises:
        ConfigError: nothing legal agrees with the fixed keys.
    """
    model = config.model.build()
    best: dict[Layout, Candidate] = {}
    for layout in _layouts(config, fixed, world_size, model, cluster):
        for option in _options(config, fixed, layout):
            step = step_of(option, layout, cluster.gpu)
            needed = memory(model, layout, step)
            found = Candidate(option, layout, step, needed, step_seconds(model, layout, step, cluster))
            if layout not in best or _order_within_layout(found, cluster) < _order_within_layout(best[layout], cluster):
                best[layout] = found
    if not best:
        sizes = ", ".join(map(str, _batch_sizes(config)))
        parts = f"train.micro_batch_size={config.train.micro_batch_size} times " if CHOSEN[0] in fixed else ""
        raise ConfigError(
            f"train.global_batch_size={sizes} does not divide by {parts}the data-parallel ranks of any legal layout"
        )
    return sorted(best.values(), key=lambda candidate: _order(candidate, cluster))


def _order(candidate: Candidate, cluster: Cluster) -> tuple[bool, float]:
    fits = candidate.fits(cluster)
    return not fits, candidate.step_seconds if fits else candidate.memory.peak


def _order_within_layout(candidate: Candidate, cluster: Cluster) -> tuple[bool, float, bool, int]:
    """Of times that are the same but for a rounding: weights gathered once, and the largest micro-batch, which launches
    least; times leave that out."""
    does_not_fit, cost = _order(candidate, cluster)
    rounded = cost if does_not_fit else float(f"{cost:.3g}")
    return does_not_fit, rounded, candidate.config.parallel.reshard, -candidate.config.train.micro_batch_size


def _layouts(config: Config, fixed: set[str], world_size: int, model: ModelConfig, cluster: Cluster) -> list[Layout]:
    asked = {key.split(".")[1]: getattr(config.parallel, key.split(".")[1]) for key in fixed if "parallel." in key}
    degrees = {axis: asked[axis] for axis in ("replicate", "shard", "tensor", "expert") if asked.get(axis)}
    found = [
        layout
        for layout in legal_layouts(world_size, model, config.data.seq_len)
        if all(getattr(layout, axis) == degree for axis, degree in degrees.items())
        and ("tensor" in degrees or layout.tensor <= cluster.gpus_per_node)
    ]
    # says what is wrong, and what would be right
    return found or [resolve(config, world_size)]


def _options(config: Config, fixed: set[str], layout: Layout) -> Iterator[Config]:
    """`config` with every choice of the open keys under which the global batches divide."""
    size_key, recompute_key, reshard_key = CHOSEN
    train, runtime, parallel = config.train, config.runtime, config.parallel
    recomputes = ("none", "full") if runtime.compile else ("none", "selective", "full")
    for size in [train.micro_batch_size] if size_key in fixed else MICRO_BATCHES:
        if any(batch % (size * layout.data) for batch in _batch_sizes(config)):
            continue
        for recompute in [runtime.activation_checkpointing] if recompute_key in fixed else recomputes:
            for reshard in [parallel.reshard] if reshard_key in fixed else (False, True):
                option = dataclasses.replace(
                    config,
                    train=dataclasses.replace(train, micro_batch_size=size),
                    runtime=dataclasses.replace(runtime, activation_checkpointing=recompute),
                    parallel=dataclasses.replace(parallel, **dataclasses.asdict(layout), reshard=reshard),
                )
                yield option


def _batch_sizes(config: Config) -> list[int]:
    return [config.train.global_batch_size, *(size for _, size in config.train.batch_ramp)]
