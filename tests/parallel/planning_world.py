"""The planner's formulas against what really happens; each function runs on every rank of a gloo world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from layout_world import share, world_of
from parallel_helpers import LANGUAGES, SEQUENCES, build_trainer, config_of, ragged_batch, split, step_terms
from traffic_counter import TrafficCounter

from moe.parallel import Layout, local
from moe.parallel.exchange import ExchangeDispatcher
from moe.planning.memory import memory
from moe.planning.step import Step, step_of
from moe.planning.traffic import Rows, step_traffic
from moe.training.trainer import Trainer


def step_for(trainer: Trainer, parts: int) -> Step:
    """Of a batch of `parallel_helpers`, cut in `parts` micro-batches."""
    layout, config = trainer.world.layout, trainer.config
    sequences = SEQUENCES // layout.data // parts
    return step_of(config, layout)._replace(
        micro_batches=parts, sequences=sequences, seq_len=12, num_languages=LANGUAGES
    )


class RowCounter:
    """Counts the rows that a trainer's dispatches exchange, forward passes alone."""

    def __init__(self, trainer: Trainer) -> None:
        self.sent = self.received = 0
        for mixture in trainer.mixtures:
            if isinstance(mixture.dispatcher, ExchangeDispatcher):
                mixture.dispatcher._gather = self._counting(mixture.dispatcher._gather, mixture.dispatcher)  # type: ignore[method-assign]

    def _counting(self, gather: Any, dispatcher: ExchangeDispatcher) -> Any:
        def counting(counts: torch.Tensor) -> Any:
            gathered = gather(counts)
            tokens = gathered[:, dispatcher.num_experts :]
            self.sent += int(tokens[dispatcher.rank].sum())
            self.received += int(tokens[:, dispatcher.rank].sum())
            return gathered

        return counting


def check_traffic(
    layout: Layout,
    parts: int = 1,
    runtime: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    **model: Any,
) -> None:
    """Bytes and calls of a whole step, by axis and collective, are the formula's."""
    world = world_of(layout)
    if world is None:
        return
    config = config_of(runtime=runtime, parallel=parallel, **model)
    trainer = build_trainer(config, world)
    batch = split(share(ragged_batch(), world), parts)
    trainer.step(0, batch)  # FSDP sets itself up
    rows, counter = RowCounter(trainer), TrafficCounter(world)
    with counter:
        trainer.step(1, batch)
    terms = step_traffic(
        trainer.model.config, layout, step_for(trainer, parts), Rows(rows.sent, rows.received), world.rank
    )
    expected: Counter[tuple[str, str, str]] = Counter()
    for term in terms:
        (axis,) = {axes for axes in counter.axes.values() if term.axis in axes.split(", ")}
        expected[axis, term.collective, "bytes"] += term.bytes
        expected[axis, term.collective, "calls"] += term.calls
    found = {(*key, "bytes"): size for key, size in counter.bytes.items()}
    found |= {(*key, "calls"): calls for key, calls in counter.calls.items()}
    assert found == dict(expected), differences(found, expected, terms)


def differences(found: dict[Any, int], expected: Counter[Any], terms: list[Any]) -> str:
    lines = [
        f"{key}: counted {found.get(key, 0)}, formula {expected[key]}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key, 0) != expected[key]
    ]
    return "\n".join([*lines, *map(str, terms)])


def check_state(layout: Layout, **model: Any) -> None:
    """Weights, moments, gradients and buffers of this rank have the planner's bytes."""
    world = world_of(layout)
    if world is None:
        return
    trainer = build_trainer(config_of(**model), world)
    slots = [slot for state in trainer.optimizer.state.values() for slot in (state["exp_avg"], state["exp_avg_sq"])]
    batch = share(ragged_batch(), world)
    sum(step_terms(trainer.model, batch, 1, 1), torch.zeros(())).backward()
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    expected = memory(trainer.model.config, layout, step_for(trainer, 1), world.rank)
    assert nbytes(trainer.model.parameters()) == expected.state["master weights"]
    assert nbytes(slots) == expected.state["AdamW moments"]
    assert nbytes(gradients) == expected.gradients
    assert nbytes(trainer.model.buffers()) == expected.state["router buffers"]


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)
