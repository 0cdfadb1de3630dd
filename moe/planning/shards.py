"""The weights of a rank, by the groups in which FSDP gathers them: `moe.parallel.parallelize` in closed form.

With S ranks along `shard`, T along `tensor`, P along `expert`, X = S T / P along `expert_shard`, a rank holds

    matrix of a dense part, norm, router   1/T of it where it is split, of that 1/S
    stacked experts, P = 1                 1/X of the experts (T = 1: in the block's own group)
    stacked experts, P > 1                 its share of the experts, of each 1/X along the hidden size

Where S does not divide the first dimension, all shards are gathered as if they were as large as the first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe.config.model import ModelConfig
from moe.parallel.layout import Layout, expert_share


class Group(NamedTuple):
    """Weights that one all-gather brings together; sizes in elements."""

    purpose: str
    """blocks, routers, experts or vocabulary."""
    axis: str
    """shard or expert_shard."""
    ranks: int
    """Along the axis."""
    number: int
    """How many such groups there are."""
    own: int
    """Held by this rank."""
    padded: int
    """Its part of an all-gather."""
    whole: int = 0
    """Of `own`, what tensor parallelism does not split."""
    is_exact: bool = False
    """Computed in float32, as routers are."""

    @property
    def gathered(self) -> int:
        return self.ranks * self.padded


class _Weight(NamedTuple):
    shape: tuple[int, ...]
    split: int | None = None
    """The dimension that tensor parallelism divides."""


class _Shard(NamedTuple):
    own: int
    padded: int
    whole: int = 0


def weight_groups(model: ModelConfig, layout: Layout, rank: int = 0) -> list[Group]:
    """All weights of `rank`; rank 0 holds as much as any."""
    mixtures = len(model.moe_layers)
    apart = layout.expert > 1 or layout.tensor > 1
    experts = _experts(model, layout, rank)
    inside = [] if apart else experts
    shard = rank // layout.tensor % layout.shard

    def dense(*weights: _Weight) -> list[_Shard]:
        return [_dense_shard(weight, layout, shard) for weight in weights]

    norm, vocabulary = _Weight((model.hidden_size,)), _Weight((model.vocab_size, model.hidden_size), split=0)
    router = _Weight((model.n_routed_experts, model.hidden_size))
    block = dense(norm, norm, *_attention(model))
    parts = [
        ("blocks", model.num_hidden_layers - mixtures, block + dense(*_mlp(model, model.intermediate_size))),
        ("blocks", mixtures, block + dense(*_mlp(model, _shared_width(model))) + inside),
        ("routers", mixtures if model.routing == "learned" else 0, dense(router)),
        ("experts", mixtures if apart else 0, experts),
        ("vocabulary", 1, dense(vocabulary, norm, vocabulary)),
    ]
    return [_group(purpose, number, shards, layout) for purpose, number, shards in parts if number]


def _group(purpose: str, number: int, shards: list[_Shard], layout: Layout) -> Group:
    own, padded, whole = (sum(sizes) for sizes in zip(*shards, strict=True))
    axis = "expert_shard" if purpose == "experts" else "shard"
    return Group(purpose, axis, getattr(layout, axis), number, own, padded, whole, purpose == "routers")


def _attention(model: ModelConfig) -> list[_Weight]:
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    columns = [_Weight((width, model.hidden_size), split=0) for width in (queries, keys, keys)]
    return [*columns, _Weight((model.hidden_size, queries), split=1)]


def _mlp(model: ModelConfig, width: float) -> list[_Weight]:
    column = _Weight((int(width), model.hidden_size), split=0)
    return [column, column, _Weight((model.hidden_size, int(width)), split=1)] if width else []


def _shared_width(model: ModelConfig) -> float:
    return model.n_shared_experts * model.moe_intermediate_size


def _dense_shard(weight: _Weight, layout: Layout, part: int) -> _Shard:
    shape, is_split = list(weight.shape), weight.split is not None and layout.tensor > 1
    if is_split:
        shape[weight.split or 0] //= layout.tensor
    # what is split by rows is sharded by columns
    cut = shape.pop(1 if is_split and weight.split == 0 else 0)
    own, padded = (rows * math.prod(shape) for rows in _rows(cut, layout.shard, part))
    return _Shard(own, padded, 0 if is_split else own)


def _experts(model: ModelConfig, layout: Layout, rank: int) -> list[_Shard]:
    """Those of one layer."""
    size = 3 * int(model.moe_intermediate_size) * model.hidden_size
    if layout.expert > 1:
        share = expert_share(model.n_routed_experts, layout.expert, rank % layout.expert)
        own = len(share) * size // layout.expert_shard
        return [_Shard(own, own)]
    own, padded = _rows(model.n_routed_experts, layout.expert_shard, rank % layout.expert_shard)
    return [_Shard(own * size, padded * size)]


def _rows(size: int, parts: int, part: int) -> tuple[int, int]:
    """Of `size` rows cut in `parts`: those of one part, and those of the first."""
    return len(expert_share(size, parts, part)), math.ceil(size / parts)
