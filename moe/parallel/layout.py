"""Which rank does what: the degrees of every kind of parallelism, checked, before any process group exists.

The ranks form a grid replicate x shard x tensor, the last axis being the fastest. Dense weights are sharded over
`shard` (FSDP2) and split over `tensor`; `replicate` holds copies of all that. Routed experts see the same ranks as
replicate x expert_shard x expert: consecutive ranks share out the experts, so that their all-to-all stays inside a node
when the node is as large as `expert`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moe.config import ConfigError, ModelConfig
from moe.config.schema import Config, ParallelConfig, TrainConfig

AXES = ("replicate", "shard", "tensor")
_MOST_LISTED = 8


@dataclass(frozen=True)
class Layout:
    """Degrees whose product replicate x shard x tensor is the number of ranks; `expert` divides shard x tensor."""

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def data(self) -> int:
        """Ranks with text of their own; those along `tensor` share theirs."""
        return self.replicate * self.shard

    @property
    def expert_shard(self) -> int:
        """Ranks over which the weights of an expert are sharded."""
        return self.shard * self.tensor // self.expert

    def __str__(self) -> str:
        degrees = {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor, "expert": self.expert}
        return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one rank"


def resolve(config: Config, world_size: int) -> Layout:
    """The layout of a run on `world_size` ranks; an axis left null takes what the others leave.

    Raises:
        ConfigError: the degrees do not fit the ranks, the model or the batch; it lists some that do.
    """
    model, seq_len, asked = config.model.build(), config.data.seq_len, _asked(config.parallel)
    layout, ranks = _fill(config.parallel, world_size), f"{world_size} rank{'s' if world_size > 1 else ''}"
    if layout is None:
        degrees = ", ".join(f"parallel.{axis}={'null' if n is None else n}" for axis, n in asked.items())
        problem = f"{degrees} do not multiply to {ranks}"
    else:
        problem = find_problem(layout, model, seq_len) or find_batch_problem(layout, config.train)
    if layout is not None and not problem:
        return layout
    legal = list(legal_layouts(world_size, model, seq_len))
    suiting = [layout for layout in legal if not find_batch_problem(layout, config.train)]
    condition = "" if suiting else "with batches that divide, "
    needs_more = world_size == 1 and any(degree and degree > 1 for degree in asked.values())
    more = "; several start as torchrun --nproc_per_node=N train.py ..." if needs_more else ""
    raise ConfigError(f"{problem}; {condition}on {ranks} these can run: {_list(suiting or legal, asked)}{more}")


def find_problem(layout: Layout, model: ModelConfig, seq_len: int) -> str:
    """Why the model cannot run under `layout`, naming the key; an empty text when it can."""
    tensor, expert = layout.tensor, layout.expert
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        if getattr(model, name) % tensor:
            return f"parallel.tensor={tensor} does not divide model.{name}={getattr(model, name)}"
    widths = {int(model.intermediate_size)} if len(model.moe_layers) < model.num_hidden_layers else set()
    if model.n_routed_experts and model.n_shared_experts:
        widths.add(model.n_shared_experts * int(model.moe_intermediate_size))
    for width in sorted(widths):
        if width % tensor:
            return f"parallel.tensor={tensor} does not divide the FFN width {width}"
    if seq_len % tensor:
        return f"parallel.tensor={tensor} does not divide data.seq_len={seq_len}"
    if tensor > 1 and model.hidden_size % layout.shard:
        return (
            f"parallel.shard={layout.shard} does not divide model.hidden_size={model.hidden_size}, "
            f"as parallel.tensor={tensor} needs"
        )
    if expert == 1:
        return ""
    if not model.n_routed_experts:
        return f"parallel.expert={expert}: the model has no routed experts"
    if layout.shard * tensor % expert:
        return f"parallel.expert={expert} does not divide shard x tensor = {layout.shard * tensor}"
    if expert > model.n_routed_experts:
        return f"parallel.expert={expert} is more ranks than the {model.n_routed_experts} routed experts"
    if model.hidden_size % layout.expert_shard:
        return (
            f"parallel.expert={expert}: the {layout.expert_shard} ranks left to shard each expert do not divide "
            f"model.hidden_size={model.hidden_size}"
        )
    return ""


def find_batch_problem(layout: Layout, train: TrainConfig) -> str:
    """Why the global batches cannot be cut under `layout`, naming the key; an empty text when they can."""
    sizes = [("train.global_batch_size", train.global_batch_size)]
    sizes += [("train.batch_ramp", size) for _, size in train.batch_ramp]
    for key, size in sizes:
        if size % (train.micro_batch_size * layout.data):
            return (
                f"{key} must be a multiple of train.micro_batch_size={train.micro_batch_size} times "
                f"{layout.data} data-parallel ranks, not {size}{_smaller_micro_batch(layout, train, sizes)}"
            )
    return ""


def _smaller_micro_batch(layout: Layout, train: TrainConfig, sizes: list[tuple[str, int]]) -> str:
    """The largest that would do, in brackets, if there is one."""
    for micro_batch_size in range(train.micro_batch_size - 1, 0, -1):
        if not any(size % (micro_batch_size * layout.data) for _, size in sizes):
            return f" (train.micro_batch_size={micro_batch_size} would do)"
    return ""


def legal_layouts(world_size: int, model: ModelConfig, seq_len: int) -> Iterator[Layout]:
    """Every layout of `world_size` ranks that the model can run under, those with few splits first."""
    for tensor in _divisors(world_size):
        for replicate in _divisors(world_size // tensor):
            shard = world_size // tensor // replicate
            for expert in _divisors(shard * tensor):
                layout = Layout(replicate, shard, tensor, expert)
                if not find_problem(layout, model, seq_len):
                    yield layout


def expert_share(num_experts: int, parts: int, part: int) -> range:
    """The experts of one of `parts` ranks: equal runs, the last shorter or empty (63 on 8: seven times 8, then 7)."""
    size = math.ceil(num_experts / parts)
    return range(min(part * size, num_experts), min((part + 1) * size, num_experts))


def _fill(parallel: ParallelConfig, world_size: int) -> Layout | None:
    """The degrees with the null one computed; None where they do not multiply to the ranks."""
    given = {axis: getattr(parallel, axis) for axis in AXES}
    missing = [axis for axis, degree in given.items() if degree is None]
    known = math.prod(degree for degree in given.values() if degree is not None)
    if len(missing) > 1 or (missing and world_size % known):
        return None
    if missing:
        given[missing[0]] = world_size // known
    layout = Layout(**given, expert=parallel.expert)
    return layout if layout.world_size == world_size else None


def _asked(parallel: ParallelConfig) -> dict[str, int | None]:
    return {axis: getattr(parallel, axis) for axis in (*AXES, "expert")}


def _list(legal: list[Layout], asked: dict[str, int | None]) -> str:
    """Those first that keep most of what was asked for."""

    def kept(layout: Layout) -> int:
        return sum(getattr(layout, axis) == degree for axis, degree in asked.items() if degree is not None)

    return "; ".join(map(str, sorted(legal, key=kept, reverse=True)[:_MOST_LISTED]))


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
