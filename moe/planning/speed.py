"""How long a step takes: matrix products, what moves between them, the optimizer, and exchanges that nothing hides.

A rank's work over what its GPU attains (`moe.hardware`), no two things at once except FSDP's exchanges, which hide
behind the passes, and the ways of rows to their experts and back, which hide behind the shared experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe.config.model import ModelConfig
from moe.hardware import GPU, Attained
from moe.parallel.layout import Layout
from moe.planning.memory import layer_rows, layer_visitors
from moe.planning.shards import weight_groups
from moe.planning.step import FLOAT32, Step
from moe.planning.traffic import Traffic, step_traffic

TERA, GIGA = 1e12, 1e9

# Passes over a tensor between the matrix products, forward and backward together, reads and writes each counted
TOKEN_PASSES = 42
"""(N, H) a block: two norms, rotary positions, residual sums."""
SWIGLU_PASSES = 9
"""(N or R, I): gate and up in, product out; their gradients, and the product once more."""
ROW_PASSES = 7
"""(R, H): gathered, combined, and back."""
FUSED_ROW_PASSES = 2
"""(R, H) where the experts are one operator, whose products read and write the rest: outputs summed, gradients too."""
EXCHANGE_PASSES = 6
"""(M, H) of the tokens that travel: copied out and summed up, both ways, outputs and gradients."""
SCORE_PASSES = 20
"""(N, E) float32."""
LOGIT_PASSES = 3
"""(N, V): logits in twice, their gradient out."""
ROUTER_PARTS = 3
"""bfloat16 products that make one of float32 (`moe.kernels.router_product`)."""
OPTIMIZER_BYTES = 34
"""A parameter held: AdamW 28, norm 4, and the cast 2 (its read)."""


class Cluster(NamedTuple):
    gpu: GPU
    gpus_per_node: int
    attained: Attained = Attained()


def step_seconds(model: ModelConfig, layout: Layout, step: Step, cluster: Cluster) -> dict[str, float]:
    """Seconds of an optimizer step of rank 0, by part; their sum is the step."""
    compute = {part: step.micro_batches * s for part, s in pass_seconds(model, layout, step, cluster).items()}
    own = sum(group.number * group.own for group in weight_groups(model, layout))
    stream = cluster.gpu.memory_bandwidth * GIGA * cluster.attained.stream
    return compute | {"optimizer": OPTIMIZER_BYTES * own / stream} | exposed_seconds(model, layout, step, cluster)


def pass_seconds(model: ModelConfig, layout: Layout, step: Step, cluster: Cluster) -> dict[str, float]:
    """A micro-batch forward and backward, without exchanges.

    A backward pass has twice the products of the forward pass, of attention two and a half times; full recomputation
    adds a forward pass, selective only what is between the products.
    """
    gpu, attained = cluster.gpu, cluster.attained
    peak, extra = gpu.peak_tflops * TERA, step.recompute == "full"
    repeated = 1 if step.recompute == "none" else 4 / 3
    grouped = attained.grouped / (attained.fullest_rank if layout.expert > 1 else 1)
    return {
        "dense products": dense_flops(model, layout, step) * (4 if extra else 3) / (peak * attained.dense),
        "expert products": expert_flops(model, layout, step) * (4 if extra else 3) / (peak * grouped),
        "attention": attention_flops(model, layout, step) * (4.5 if extra else 3.5) / (peak * attained.attention),
        "routers": ROUTER_PARTS * 3 * router_flops(model, layout, step) / (peak * attained.dense),
        "between products": repeated
        * moved_bytes(model, layout, step)
        / (gpu.memory_bandwidth * GIGA * attained.memory),
    }


def dense_flops(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Forward: projections of attention, dense and shared MLPs, the head; computed once more where logits come in
    chunks."""
    heads = 2 * model.hidden_size * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    mlps = 3 * model.hidden_size * _mlp_width(model)
    head = model.vocab_size * model.hidden_size
    return 2 * step.tokens * (model.num_hidden_layers * heads + mlps + head) / layout.tensor


def expert_flops(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Forward, all layers."""
    weights = 3 * model.hidden_size * int(model.moe_intermediate_size)
    return 2 * len(model.moe_layers) * layer_rows(model, layout, step) * weights


def attention_flops(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Forward, all layers: scores and their sums of values, each causal half counted."""
    width = model.num_attention_heads * model.head_dim / layout.tensor
    return 2 * model.num_hidden_layers * step.tokens * step.seq_len * width


def router_flops(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Forward, all layers."""
    learned = len(model.moe_layers) if model.routing == "learned" else 0
    return 2 * learned * step.tokens / layout.tensor * model.hidden_size * model.n_routed_experts


def moved_bytes(model: ModelConfig, layout: Layout, step: Step) -> float:
    """Between the products, forward and backward: the passes above."""
    own, rows, mixtures = step.tokens / layout.tensor, layer_rows(model, layout, step), len(model.moe_layers)
    row_passes, swiglu_passes = (FUSED_ROW_PASSES, 0) if step.fused_experts else (ROW_PASSES, SWIGLU_PASSES)
    per_mixture = rows * (row_passes * model.hidden_size + swiglu_passes * int(model.moe_intermediate_size))
    if layout.expert > 1:
        per_mixture += EXCHANGE_PASSES * layer_visitors(model, layout, step).received * model.hidden_size
    elements = TOKEN_PASSES * own * model.hidden_size * model.num_hidden_layers
    elements += SWIGLU_PASSES * step.tokens / layout.tensor * _mlp_width(model) + mixtures * per_mixture
    scores = SCORE_PASSES * own * model.n_routed_experts * mixtures
    elements += LOGIT_PASSES * step.tokens * model.vocab_size / layout.tensor
    return elements * step.compute_bytes + scores * FLOAT32


def _mlp_width(model: ModelConfig) -> float:
    """Of all dense layers and shared experts together."""
    mixtures = len(model.moe_layers)
    shared = mixtures * model.n_shared_experts * model.moe_intermediate_size
    return (model.num_hidden_layers - mixtures) * model.intermediate_size + shared


def exposed_seconds(model: ModelConfig, layout: Layout, step: Step, cluster: Cluster) -> dict[str, float]:
    """Exchanges that the rank waits for."""
    terms = step_traffic(model, layout, step)
    seconds = {term: exchange_seconds(term, layout, cluster) for term in terms}
    gathers = sum(s for t, s in seconds.items() if t.axis in ("shard", "expert_shard") and t.collective == "all_gather")
    reduces = sum(s for t, s in seconds.items() if t.collective == "reduce_scatter" and t.axis != "tensor")
    reduces += sum(s for t, s in seconds.items() if t.axis == "replicate")
    rows = sum(s for t, s in seconds.items() if t.axis == "expert")
    sequences = sum(s for t, s in seconds.items() if t.axis == "tensor")
    one_pass = sum(pass_seconds(model, layout, step, cluster).values())
    forward = one_pass / 3 * (step.micro_batches if step.reshard else 1)
    # resharded, half of the gathers belong to the backward pass
    early, late = (gathers / 2, gathers / 2 + reduces) if step.reshard else (gathers, reduces)
    return {
        "weights": max(0.0, early - forward) + max(0.0, late - 2 * forward),
        "rows": _exposed_rows(rows, _shared_seconds(model, layout, step, cluster)),
        "sequences": sequences,
        "sums": sum(s for t, s in seconds.items() if t.axis == "all"),
    }


def _exposed_rows(rows: float, shared: float) -> float:
    """Of the rows' ways, in seconds: tokens' hide behind gate and up of the shared experts, outputs' behind down."""
    return max(0.0, rows / 2 - shared * 2 / 3) + max(0.0, rows / 2 - shared / 3)


def _shared_seconds(model: ModelConfig, layout: Layout, step: Step, cluster: Cluster) -> float:
    """What the shared experts take in a step."""
    width = len(model.moe_layers) * model.n_shared_experts * model.moe_intermediate_size / layout.tensor
    flops = 3 * 2 * step.micro_batches * step.tokens * 3 * model.hidden_size * width
    return flops / (cluster.gpu.peak_tflops * TERA * cluster.attained.dense)


def exchange_seconds(term: Traffic, layout: Layout, cluster: Cluster) -> float:
    """A term's calls, one after the other.

    The members of a group that share a node pass a ring's traffic to the next node through all their ports together; in
    an all-to-all each sends what it has for other nodes through its own.
    """
    gpu, ranks = cluster.gpu, term.ranks
    inside = min(ranks, max(1, cluster.gpus_per_node // _stride(term.axis, layout)))
    nodes = math.ceil(ranks / inside)
    if term.collective == "all_to_all":
        linked, sent = term.bytes * (inside - 1) / ranks, term.bytes * (ranks - inside) / ranks
    else:
        linked = term.wire_bytes
        sent = term.wire_bytes * ranks / (ranks - 1) * (nodes - 1) / nodes / inside
    attained = cluster.attained
    inside_seconds = linked / (gpu.link_bandwidth * attained.links) if inside > 1 else 0.0
    slower = max(inside_seconds, sent / (gpu.network_bandwidth * attained.network))
    call_seconds = attained.split_call_seconds if term.axis == "tensor" else attained.call_seconds
    return slower / GIGA + term.calls * call_seconds


def _stride(axis: str, layout: Layout) -> int:
    """How far neighbours along `axis` lie apart, in ranks."""
    strides = {"shard": layout.tensor, "expert_shard": layout.expert, "replicate": layout.shard * layout.tensor}
    return strides.get(axis, 1)
