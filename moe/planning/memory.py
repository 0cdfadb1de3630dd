"""How much memory a rank needs to train: a sum of named parts, each from the tensors that make it up.

N tokens a micro-batch, of which a rank has N / tensor between the matrices; H hidden size; S and M tokens that a rank
sends to the experts and receives for its own, R rows that they are there, N K / tensor where the load is even, I the
experts' width; E routed experts, K of them active; V vocabulary. Sizes are bytes. Left out: the allocator's
fragmentation and what the libraries take for themselves (CUDA context, NCCL, cuBLAS).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moe.config.model import ModelConfig
from moe.parallel.layout import Layout
from moe.planning.shards import weight_groups
from moe.planning.step import FLOAT32, INT32, INT64, Step
from moe.planning.traffic import Rows, balanced_rows


class Memory(NamedTuple):
    """By part; the peak is that of two moments: an optimizer step, and the start of the last backward pass."""

    state: dict[str, int]
    """Held from the first step to the last."""
    pass_: dict[str, int]
    """Held while a micro-batch goes forward and backward: weights to compute with, gradients so far, activations."""
    workspace: dict[str, int]
    """Short-lived peaks, never two at a time."""
    gradients: int
    """When the optimizer moves."""

    @property
    def peak(self) -> int:
        in_a_pass = sum(self.pass_.values()) + max(self.workspace.values())
        return sum(self.state.values()) + max(in_a_pass, self.gradients)


def memory(model: ModelConfig, layout: Layout, step: Step, rank: int = 0) -> Memory:
    own = sum(group.number * group.own for group in weight_groups(model, layout, rank))
    state = {
        "master weights": FLOAT32 * own,
        "AdamW moments": 2 * FLOAT32 * own,
        "router buffers": router_buffer_bytes(model),
    }
    weights = {
        "compute copy": copy_bytes(model, layout, step, rank),
        "gradients": accumulated_bytes(model, layout, step, rank),
    }
    activations = activation_bytes(model, layout, step)
    workspace = workspace_bytes(model, layout, step) | {"reduction": reduction_bytes(model, layout, step, rank)}
    return Memory(state, weights | activations, workspace, FLOAT32 * own)


def router_buffer_bytes(model: ModelConfig) -> int:
    """Selection biases of auxiliary-loss-free balancing, or the table of hash routing."""
    if model.routing == "hash":
        return len(model.moe_layers) * INT64 * model.vocab_size * model.num_experts_per_tok
    return len(model.moe_layers) * FLOAT32 * model.n_routed_experts if model.bias_update_speed > 0 else 0


def copy_bytes(model: ModelConfig, layout: Layout, step: Step, rank: int = 0) -> int:
    """Gathered weights in the compute dtype (routers: float32), kept from the first forward pass of a step to its last
    backward pass, on one device and in float32 as well.

    Resharded, they are the vocabulary's, those of the block in use, those of the next, and the buffer these arrive in.
    """
    groups = weight_groups(model, layout, rank)
    sizes = {g: g.gathered * (FLOAT32 if g.is_exact else step.compute_bytes) for g in groups}
    if not step.reshard:
        return sum(g.number * size for g, size in sizes.items())
    vocabulary = sum(size for g, size in sizes.items() if g.purpose == "vocabulary")
    blocks = [size for g, size in sizes.items() if g.purpose == "blocks"]
    return vocabulary + 3 * (max(blocks) + sum(sizes.values()) - vocabulary - sum(blocks))


def accumulated_bytes(model: ModelConfig, layout: Layout, step: Step, rank: int = 0) -> int:
    """Float32 gradients of earlier micro-batches: whole until the last reduces them, shards where each does.

    Of a single micro-batch there are none yet when its backward pass begins; they come as activations go.
    """
    if step.micro_batches == 1:
        return 0
    groups = weight_groups(model, layout, rank)
    return FLOAT32 * sum(g.number * (g.own if step.reshard else g.gathered) for g in groups)


def reduction_bytes(model: ModelConfig, layout: Layout, step: Step, rank: int = 0) -> int:
    """The largest group's gradients while FSDP reduces them: in the compute dtype and, to be sent, in float32. A group
    of one rank sends nothing: they become float32 one by one, or are added to those of earlier micro-batches."""
    of_one = FLOAT32 if step.micro_batches == 1 else step.compute_bytes
    sizes = {True: of_one, False: step.compute_bytes + FLOAT32}
    groups = weight_groups(model, layout, rank)
    return max(g.gathered * sizes[layout.replicate == getattr(layout, g.axis) == 1] for g in groups)


def activation_bytes(model: ModelConfig, layout: Layout, step: Step) -> dict[str, int]:
    """What autograd keeps of one micro-batch from the forward pass to the backward pass, by part; logits are workspace.

    Recomputed in full, a block keeps its input and the router's choices alone; selectively, the results of its matrix
    products, attention and exchanges as well.
    """
    parts = [{"norms": norm_bytes(model, layout, step), "head": head_bytes(model, layout, step)}]
    if step.recompute != "none":
        parts.append(recomputed_bytes(model, layout, step))
    kept = {"none": block_bytes, "selective": kept_bytes, "full": _nothing}[step.recompute]
    for layer, count in _layer_kinds(model):
        parts.append({part: count * size for part, size in kept(model, layer, layout, step).items()})
    return _sum(parts)


def _layer_kinds(model: ModelConfig) -> list[tuple[int, int]]:
    """A layer of each kind, dense or mixture, and how many there are."""
    dense = [layer for layer in range(model.num_hidden_layers) if not model.is_moe_layer(layer)]
    return [(layers[0], len(layers)) for layers in (dense, model.moe_layers) if layers]


def block_bytes(model: ModelConfig, layer: int, layout: Layout, step: Step) -> dict[str, int]:
    """One block without recomputation."""
    parts = {"norms": 2 * norm_bytes(model, layout, step), "attention": attention_bytes(model, layout, step)}
    if not model.is_moe_layer(layer):
        return parts | {"dense FFN": mlp_bytes(model, model.intermediate_size, layout, step)}
    rows = layer_rows(model, layout, step)
    return parts | {
        "router": router_bytes(model, layout, step),
        "rows": row_bytes(model, rows, layout, step),
        "expert hidden": expert_hidden_bytes(model, rows, step),
        "shared experts": shared_expert_bytes(model, layout, step),
    }


def layer_rows(model: ModelConfig, layout: Layout, step: Step) -> int:
    """R, the load being even, of the largest share of the experts."""
    own = math.ceil(model.n_routed_experts / layout.expert)
    choices = step.tokens // layout.tensor * model.num_experts_per_tok
    return math.ceil(choices * layout.expert * own / max(1, model.n_routed_experts))


def layer_visitors(model: ModelConfig, layout: Layout, step: Step) -> Rows:
    """Tokens that a layer sends to experts and receives for its own, S and M; all experts being here, its N."""
    if layout.expert == 1:
        return Rows(step.tokens // layout.tensor, step.tokens // layout.tensor)
    passes = step.micro_batches * max(1, len(model.moe_layers))
    return Rows(*(rows // passes for rows in balanced_rows(model, layout, step)))


def norm_bytes(model: ModelConfig, layout: Layout, step: Step) -> int:
    """One RMSNorm: its input and (N,) reciprocal norms; on a CPU input and normalised input in float32."""
    kept = 2 * FLOAT32 if step.kernels == "cpu" else step.compute_bytes
    return step.tokens // layout.tensor * (kept * model.hidden_size + FLOAT32)


def attention_bytes(model: ModelConfig, layout: Layout, step: Step) -> int:
    """The normalised input, of whole sequences; queries, keys, values (under GQA for all heads) and output of a rank's
    heads, and their log-sum-exp."""
    heads = model.num_attention_heads // layout.tensor
    width = model.hidden_size + 4 * heads * model.head_dim
    return step.tokens * (width * step.compute_bytes + FLOAT32 * heads)


def router_bytes(model: ModelConfig, layout: Layout, step: Step) -> int:
    """The input in float32, or, where experts are one operator, as it is, if no shared experts keep it anyway; logits,
    log scores, scores (N, E); choices and weights (N, K); log-sum-exp and mask (N,)."""
    tokens = step.tokens // layout.tensor
    if model.routing == "hash":
        return tokens
    chosen = model.num_experts_per_tok * (INT64 + FLOAT32)
    of_input = FLOAT32 if not step.fused_experts else 0 if model.n_shared_experts else step.compute_bytes
    return tokens * (of_input * model.hidden_size + FLOAT32 * (3 * model.n_routed_experts + 1) + chosen + 1)


def row_bytes(model: ModelConfig, rows: int, layout: Layout, step: Step) -> int:
    """Rows into and out of the routed experts (R, H), their slots and tokens (R,), the gate weights and rows of all
    choices (M, K); for experts that are one operator, of rows their tokens and weights alone, but the tokens that have
    travelled (M, H). Where these left, the tokens and rows of their choices (N, K)."""
    hidden, chosen = model.hidden_size * step.compute_bytes, model.num_experts_per_tok
    visitors = layer_visitors(model, layout, step).received
    of_row = INT32 + (FLOAT32 if step.fused_experts else INT64 + 2 * hidden)
    size = visitors * chosen * (INT64 + FLOAT32) + rows * of_row
    if layout.expert == 1:
        return size
    arrived = visitors * hidden if step.fused_experts else 0
    return size + arrived + step.tokens // layout.tensor * chosen * (INT64 + INT32)


def expert_hidden_bytes(model: ModelConfig, rows: int, step: Step) -> int:
    """gate and up alone where they are fused, else those of a SwiGLU."""
    width = int(model.moe_intermediate_size)
    return 2 * rows * width * step.compute_bytes if step.fused_experts else swiglu_bytes(rows, width, step)


def swiglu_bytes(rows: int, width: float, step: Step) -> int:
    """gate, up and silu(gate) * up, (rows, width) each; uncompiled also silu(gate)."""
    return (3 if step.kernels == "compiled" else 4) * rows * int(width) * step.compute_bytes


def mlp_bytes(model: ModelConfig, width: float, layout: Layout, step: Step) -> int:
    """The normalised input, of whole sequences, and the SwiGLU of an MLP whose width `tensor` splits."""
    hidden = swiglu_bytes(step.tokens, width / layout.tensor, step)
    return step.tokens * model.hidden_size * step.compute_bytes + hidden


def shared_expert_bytes(model: ModelConfig, layout: Layout, step: Step) -> int:
    """Their MLP; its input is the router's where that is float32 and of whole sequences too."""
    if not model.n_shared_experts:
        return 0
    size = mlp_bytes(model, model.n_shared_experts * model.moe_intermediate_size, layout, step)
    is_shared = step.compute_bytes == FLOAT32 and model.routing == "learned" and layout.tensor == 1
    return size - step.tokens * model.hidden_size * FLOAT32 if is_shared else size


def head_bytes(model: ModelConfig, layout: Layout, step: Step) -> int:
    """Gradients of the head's input and weights (float32), made at once; ids (N,); rotary angles, 2 x (T, head_dim)."""
    per_token = model.hidden_size * step.compute_bytes + INT64
    weight = FLOAT32 * model.vocab_size * model.hidden_size // layout.tensor
    return step.tokens * per_token + weight + 2 * FLOAT32 * step.seq_len * model.head_dim


def recomputed_bytes(model: ModelConfig, layout: Layout, step: Step) -> dict[str, int]:
    """All blocks with recomputation: the residual stream into each, top-k's indices (int64)."""
    tokens = step.tokens // layout.tensor
    inputs = model.num_hidden_layers * tokens * model.hidden_size * step.compute_bytes
    learned = len(model.moe_layers) if model.routing == "learned" else 0
    return {"block inputs": inputs, "routing choices": learned * tokens * model.num_experts_per_tok * INT64}


def kept_bytes(model: ModelConfig, layer: int, layout: Layout, step: Step) -> dict[str, int]:
    """What selective recomputation keeps of a block: results of matrix products, attention and exchanges.

    Of attention queries, keys, values, output and the projection of that; of an MLP gate, up and output; of the routed
    experts the same by rows, and these as they arrive at either end. Of experts that are one operator the choices in
    their order as well, between ranks by expert and by rank.
    """
    hidden, own = model.hidden_size, step.tokens // layout.tensor
    width, heads = (
        model.num_attention_heads * model.head_dim // layout.tensor,
        model.num_attention_heads // layout.tensor,
    )
    gathers = step.tokens * hidden + own * hidden if layout.tensor > 1 else 0  # a part's gathered input, its own sum
    kv_width = 2 * model.num_key_value_heads * model.head_dim // layout.tensor
    attention = step.tokens * (2 * width + kv_width + hidden) + gathers
    parts = {"attention": attention * step.compute_bytes + step.tokens * heads * FLOAT32}

    def mlp(inner: float) -> int:
        return (step.tokens * (2 * int(inner) // layout.tensor + hidden) + gathers) * step.compute_bytes

    if not model.is_moe_layer(layer):
        return parts | {"dense FFN": mlp(model.intermediate_size)}
    rows, visitors = layer_rows(model, layout, step), layer_visitors(model, layout, step)
    exchanged = sum(visitors) if layout.expert > 1 else 0
    choices = 2 * model.num_experts_per_tok * visitors.received * FLOAT32 if layout.expert > 1 else 0
    results = visitors.received if step.fused_experts else rows
    sorts = 0 if not step.fused_experts else 1 if layout.expert == 1 else 2
    sorted_choices = sorts * own * model.num_experts_per_tok * (2 * INT64 + INT32)
    return parts | {
        "router": (FLOAT32 * own * model.n_routed_experts if model.routing == "learned" else 0) + sorted_choices,
        "rows": (results + exchanged) * hidden * step.compute_bytes + choices,
        "expert hidden": 2 * rows * int(model.moe_intermediate_size) * step.compute_bytes,
        "shared experts": mlp(model.n_shared_experts * model.moe_intermediate_size) if model.n_shared_experts else 0,
    }


def _nothing(model: ModelConfig, layer: int, layout: Layout, step: Step) -> dict[str, int]:
    return {}


def workspace_bytes(model: ModelConfig, layout: Layout, step: Step) -> dict[str, int]:
    """Short-lived peaks while the head works and while a block goes backward: never both, so the larger one counts."""
    layers = [layer for layer, _ in _layer_kinds(model)]
    return {
        "logits chunk": logit_bytes(model, layout, step),
        "block backward": max(block_workspace_bytes(model, layer, layout, step) for layer in layers),
    }


def logit_bytes(model: ModelConfig, layout: Layout, step: Step) -> int:
    """One chunk's logits (chunk, V) in the compute dtype, their gradient in their place; on a CPU in float32, beside a
    gradient in another dtype; of a split vocabulary logits and exponentials, float32 each."""
    width = 2 * FLOAT32
    if layout.tensor == 1 and step.kernels != "cpu":
        width = step.compute_bytes
    elif layout.tensor == 1:
        width = FLOAT32 + (0 if step.compute_bytes == FLOAT32 else step.compute_bytes)  # float32 is its own gradient
    return width * min(step.tokens, step.loss_chunk_size) * model.vocab_size // layout.tensor


def block_workspace_bytes(model: ModelConfig, layer: int, layout: Layout, step: Step) -> int:
    """The block's activations where they are recomputed; of a mixture, the gradients of its rows.

    Those are two products of the combine, float32, and the result in the compute dtype, (R, H) each; compiled, the
    result alone and the gradient of the experts' hidden values; of experts that are one operator the widest alone,
    since the hidden values give their memory to their gradient. An upper bound: what lies after the combine (shared
    experts, statistics) is freed before.
    """
    whole = sum(block_bytes(model, layer, layout, step).values())
    kept = {"none": whole, "full": 0, "selective": sum(kept_bytes(model, layer, layout, step).values())}
    recomputed = max(0, whole - kept[step.recompute])
    if not model.is_moe_layer(layer):
        return recomputed
    width = model.hidden_size * (2 * FLOAT32 + step.compute_bytes)
    if step.fused_experts:
        width = max(model.hidden_size, int(model.moe_intermediate_size)) * step.compute_bytes
    elif step.kernels == "compiled":
        width = (model.hidden_size + int(model.moe_intermediate_size)) * step.compute_bytes
    return recomputed + layer_rows(model, layout, step) * width


def _sum(parts: list[dict[str, int]]) -> dict[str, int]:
    """Key by key."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0) for part in parts) for key in keys}
