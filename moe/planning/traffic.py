"""What a rank exchanges with others in one optimizer step, collective by collective; a sum of terms with a shape each.

`Traffic.bytes` is the size of the whole tensor that a collective is about: what an all-gather leaves on each rank, what
a reduce-scatter or an all-reduce starts from on each rank, and the rows that a rank sends in an all-to-all, those to
itself included. `Traffic.wire_bytes` is what of it leaves the rank when the others get their parts around a ring or
directly.

The same counts are measured call by call in `tests/parallel/test_traffic.py`; docs/parallelism.md explains them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from moe.config.model import ModelConfig
from moe.parallel.layout import Layout, expert_share
from moe.planning.shards import Group, weight_groups
from moe.planning.step import FLOAT32, FLOAT64, INT64, Step


class Traffic(NamedTuple):
    """One term: all calls of one collective, over the groups of one axis, for one purpose, in one optimizer step."""

    axis: str
    """replicate, shard, tensor, expert_shard, expert or all."""
    collective: str
    """all_gather, reduce_scatter, all_reduce or all_to_all."""
    purpose: str
    calls: int
    bytes: int
    ranks: int
    """How many take part."""

    @property
    def wire_bytes(self) -> float:
        """What the rank sends to others."""
        passes = 2 if self.collective == "all_reduce" else 1
        return passes * self.bytes * (self.ranks - 1) / self.ranks


_Term = tuple[tuple[str, str, str], int, int]
"""(axis, collective, purpose), calls, bytes."""


class Rows(NamedTuple):
    """Of the dispatches of one step, over all layers and micro-batches, forward; a token makes one for every rank that
    has experts of it."""

    sent: int
    """By this rank, to itself included."""
    received: int


def balanced_rows(model: ModelConfig, layout: Layout, step: Step) -> Rows:
    """Those of rank 0 that are to be expected, no token being padding and all sets of experts being as likely."""
    passes = step.micro_batches * len(model.moe_layers)
    shares = [len(expert_share(model.n_routed_experts, layout.expert, rank)) for rank in range(layout.expert)]
    reached = [_chance_of_any(model.n_routed_experts, share, model.num_experts_per_tok) for share in shares]
    tokens = passes * step.tokens / layout.tensor
    return Rows(math.ceil(tokens * sum(reached)), math.ceil(tokens * layout.expert * reached[0]))


def _chance_of_any(experts: int, share: int, chosen: int) -> float:
    """That one of `share` experts is among `chosen` of all."""
    return 1 - math.comb(experts - share, chosen) / math.comb(experts, chosen)


def step_traffic(
    model: ModelConfig, layout: Layout, step: Step, rows: Rows | None = None, rank: int = 0
) -> list[Traffic]:
    """All terms of `rank`; those along an axis of one rank are left out.

    `rows`: what its dispatches really brought; by default what they bring when the load is even.
    """
    groups = weight_groups(model, layout, rank)
    terms = [*_weights(groups, step), *_sums(model, step)]
    if layout.tensor > 1:
        terms += [*_sequences(model, step), _whole_gradients(groups)]
    if layout.expert > 1:
        terms += _rows(model, layout, step, rows or balanced_rows(model, layout, step))
    sums: dict[tuple[str, str, str], tuple[int, int]] = {}
    for key, calls, size in terms:
        other_calls, other_size = sums.get(key, (0, 0))
        sums[key] = calls + other_calls, size + other_size
    found = (
        Traffic(*key, *sizes, layout.world_size if key[0] == "all" else getattr(layout, key[0]))
        for key, sizes in sums.items()
    )
    return [term for term in found if term.ranks > 1 and term.calls]


def _weights(groups: list[Group], step: Step) -> Iterator[_Term]:
    """FSDP: weights gathered in the compute dtype, gradients reduced in float32."""
    passes = step.micro_batches if step.reshard else 1
    for group in groups:
        purpose, width = group.purpose, FLOAT32 if group.is_exact else step.compute_bytes
        # the vocabulary, last to be used, stays from a forward pass to the backward pass
        gathers = group.number * passes * (2 if step.reshard and purpose != "vocabulary" else 1)
        reduces = group.number * passes
        yield (group.axis, "all_gather", purpose), gathers, gathers * group.gathered * width
        yield (group.axis, "reduce_scatter", purpose), reduces, reduces * group.gathered * FLOAT32
        yield ("replicate", "all_reduce", purpose), group.number, group.number * group.padded * FLOAT32


def _sequences(model: ModelConfig, step: Step) -> Iterator[_Term]:
    """Tensor parallelism: each part of a block gathers the sequence and scatters its sum, forward and backward."""
    size = step.micro_batches * step.tokens * model.hidden_size * step.compute_bytes
    dense = model.num_hidden_layers - len(model.moe_layers)
    parts = model.num_hidden_layers + dense + (len(model.moe_layers) if model.n_shared_experts else 0)
    is_repeated = step.recompute == "full"
    gathers = (3 if is_repeated else 2) * parts
    reduces = gathers - (dense if is_repeated else 0)  # recomputation ends before the sum at a dense block's end
    for purpose, gathered, reduced in (("blocks", gathers, reduces), ("embedding", 1, 1), ("head", 1, 1)):
        yield ("tensor", "all_gather", purpose), step.micro_batches * gathered, gathered * size
        yield ("tensor", "reduce_scatter", purpose), step.micro_batches * reduced, reduced * size
    chunks = math.ceil(step.tokens / step.loss_chunk_size)
    counts = 2 * step.micro_batches * chunks
    yield ("tensor", "all_reduce", "loss"), counts, 3 * step.micro_batches * step.tokens * FLOAT32


def _whole_gradients(groups: list[Group]) -> _Term:
    size = sum(group.number * group.whole for group in groups)
    return ("tensor", "all_reduce", "norms and routers"), 1, size * FLOAT32


def _rows(model: ModelConfig, layout: Layout, step: Step, rows: Rows) -> Iterator[_Term]:
    """Expert parallelism: tokens to their experts and back, forward and backward, and with them choices and weights."""
    calls = step.micro_batches * len(model.moe_layers)
    passes = 3 if step.recompute == "full" else 2
    size = passes * (rows.sent + rows.received) * model.hidden_size * step.compute_bytes
    yield ("expert", "all_to_all", "rows"), 2 * passes * calls, size
    learned = int(model.routing == "learned")  # gate values of a hash have no gradient to send back
    choices = ((passes - 1) * rows.sent + learned * rows.received) * 2 * model.num_experts_per_tok * FLOAT32
    yield ("expert", "all_to_all", "choices"), (passes - 1 + learned) * calls, choices
    counts = layout.expert * (model.n_routed_experts + layout.expert) * INT64
    yield ("expert", "all_gather", "counts"), calls, calls * counts


def _sums(model: ModelConfig, step: Step) -> Iterator[_Term]:
    """Labels, tokens and the stop flag before a step; losses and counts, and the gradients' norm, after it; balance."""
    layers, languages = len(model.moe_layers), step.num_languages
    metrics = 2 * languages + 3 + layers + layers * languages * model.n_routed_experts
    yield ("all", "all_reduce", "step"), 3, (3 + metrics + 1) * FLOAT64
    if model.routing == "learned":
        pooled = (step.sequences if model.seq_aux else 1) * (model.n_routed_experts + 1)
        calls = step.micro_batches * layers * (1 if step.recompute == "none" else 2)
        axis = "tensor" if model.seq_aux else "all"
        yield (axis, "all_reduce", "balance"), 2 * calls, calls * pooled * FLOAT32
