"""How much memory one device needs to train: a sum of named parts, each from the tensors that make it up.

N tokens a micro-batch, T a sequence, H hidden size, E routed experts, K of them active, V vocabulary; figures in bytes.
Activations are those of the eager model; `torch.compile` keeps fewer. Left out: the allocator's fragmentation and what
the libraries take for themselves (CUDA context, cuBLAS).
"""

from __future__ import annotations

from typing import NamedTuple

from moe.config.model import ModelConfig

FLOAT32 = 4
INT64 = 8


class MicroBatch(NamedTuple):
    """One forward pass and how it is computed."""

    sequences: int
    seq_len: int
    compute_bytes: int
    """Of one element of the compute dtype: 4 or 2."""
    num_languages: int
    loss_chunk_size: int
    fused_norms: bool
    """Whether RMSNorm is one kernel (CUDA) or a chain of float32 operations (CPU)."""
    recompute: bool
    """Activation checkpointing of every block."""

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


def state_bytes(model: ModelConfig, compute_bytes: int) -> dict[str, int]:
    """What the training state takes from the first step to the last.

    FSDP keeps a copy in the compute dtype (routers: float32) beside the float32 masters, even on one device in float32.
    """
    params, router = model.num_params(), router_params(model)
    return {
        "master weights": FLOAT32 * params,
        "compute copy": compute_bytes * (params - router) + FLOAT32 * router,
        "gradients": FLOAT32 * params,
        "AdamW moments": 2 * FLOAT32 * params,
        "router buffers": router_buffer_bytes(model),
    }


def router_params(model: ModelConfig) -> int:
    """Parameters of all learned routers."""
    return len(model.moe_layers) * model.n_routed_experts * model.hidden_size if model.routing == "learned" else 0


def router_buffer_bytes(model: ModelConfig) -> int:
    """Selection biases of auxiliary-loss-free balancing, or the table of hash routing."""
    if model.routing == "hash":
        return len(model.moe_layers) * INT64 * model.vocab_size * model.num_experts_per_tok
    return len(model.moe_layers) * FLOAT32 * model.n_routed_experts if model.bias_update_speed > 0 else 0


def activation_bytes(model: ModelConfig, batch: MicroBatch) -> dict[str, int]:
    """What autograd keeps of one micro-batch from the forward pass to the backward pass, by part; logits are workspace.

    With recomputation a block keeps its input and the router's choices alone.
    """
    if batch.recompute:
        blocks = [recomputed_block_bytes(model, batch)]
    else:
        blocks = [block_bytes(model, layer, batch) for layer in range(model.num_hidden_layers)]
    return _sum([*blocks, {"norms": norm_bytes(model, batch), "head": head_bytes(model, batch)}])


def block_bytes(model: ModelConfig, layer: int, batch: MicroBatch) -> dict[str, int]:
    """One block without recomputation."""
    parts = {"norms": 2 * norm_bytes(model, batch), "attention": attention_bytes(model, batch)}
    if not model.is_moe_layer(layer):
        return parts | {"dense FFN": dense_ffn_bytes(model, batch)}
    rows = batch.tokens * model.num_experts_per_tok
    return parts | {
        "router": router_bytes(model, batch),
        "gathered rows": row_bytes(model, batch),
        "expert hidden": swiglu_bytes(rows, model.moe_intermediate_size, batch.compute_bytes),
        "shared experts": shared_expert_bytes(model, batch),
    }


def recomputed_block_bytes(model: ModelConfig, batch: MicroBatch) -> dict[str, int]:
    """All blocks with recomputation: the residual stream into each, top-k's values (float32) and indices (int64)."""
    inputs = model.num_hidden_layers * batch.tokens * model.hidden_size * batch.compute_bytes
    learned = len(model.moe_layers) if model.routing == "learned" else 0
    choices = learned * batch.tokens * model.num_experts_per_tok * (FLOAT32 + INT64)
    return {"block inputs": inputs, "routing choices": choices}


def norm_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """One RMSNorm: its input and (N,) reciprocal norms; unfused, input and normalised input in float32."""
    kept = batch.compute_bytes if batch.fused_norms else 2 * FLOAT32
    return batch.tokens * (kept * model.hidden_size + FLOAT32)


def attention_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """The normalised input; queries, keys, values (under GQA for all heads) and output; (N, heads) log-sum-exp."""
    width = model.num_attention_heads * model.head_dim
    return batch.tokens * ((model.hidden_size + 4 * width) * batch.compute_bytes + FLOAT32 * model.num_attention_heads)


def router_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """The float32 input; logits, log scores, scores (N, E); choices and weights (N, K); log-sum-exp and mask (N,)."""
    if model.routing == "hash":
        return batch.tokens
    chosen = model.num_experts_per_tok * (INT64 + FLOAT32)
    return batch.tokens * (FLOAT32 * (model.hidden_size + 3 * model.n_routed_experts + 1) + chosen + 1)


def row_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """Rows into and out of the routed experts (N K, H), three permutations and the gate weights (N K,)."""
    rows = batch.tokens * model.num_experts_per_tok
    return rows * (2 * model.hidden_size * batch.compute_bytes + 3 * INT64 + FLOAT32)


def swiglu_bytes(rows: int, width: float, compute_bytes: int) -> int:
    """gate, up, silu(gate) and their product, (rows, width) each."""
    return 4 * rows * int(width) * compute_bytes


def dense_ffn_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """The normalised input and the SwiGLU of a dense layer."""
    input_bytes = batch.tokens * model.hidden_size * batch.compute_bytes
    return input_bytes + swiglu_bytes(batch.tokens, model.intermediate_size, batch.compute_bytes)


def shared_expert_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """Their SwiGLU; their input too unless it is the router's float32 one."""
    if not model.n_shared_experts:
        return 0
    shares_input = batch.compute_bytes == FLOAT32 and model.routing == "learned"
    input_bytes = 0 if shares_input else batch.tokens * model.hidden_size * batch.compute_bytes
    width = model.n_shared_experts * model.moe_intermediate_size
    return input_bytes + swiglu_bytes(batch.tokens, width, batch.compute_bytes)


def head_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """The head's input; ids and labels (N,), one-hot languages (N, languages); rotary angles, 2 x (T, head_dim)."""
    per_token = model.hidden_size * batch.compute_bytes + 2 * INT64 + FLOAT32 * batch.num_languages
    return batch.tokens * per_token + 2 * FLOAT32 * batch.seq_len * model.head_dim


def workspace_bytes(model: ModelConfig, batch: MicroBatch) -> dict[str, int]:
    """Short-lived peaks while the head works and while a block goes backward: never both, so the larger one counts."""
    layers = range(model.num_hidden_layers)
    return {
        "logits chunk": logit_workspace_bytes(model, batch),
        "block backward": max(block_workspace_bytes(model, layer, batch) for layer in layers),
    }


def logit_workspace_bytes(model: ModelConfig, batch: MicroBatch) -> int:
    """One chunk's log-probabilities, their gradient and the logits', (chunk, V) float32 each."""
    return 3 * FLOAT32 * min(batch.tokens, batch.loss_chunk_size) * model.vocab_size


def block_workspace_bytes(model: ModelConfig, layer: int, batch: MicroBatch) -> int:
    """The block's activations where they are recomputed; of a mixture, the gradients of its rows.

    Those are two products of the combine, float32, and the result in the compute dtype, (N K, H) each. An upper bound:
    what lies after the combine (shared experts, statistics) is freed before.
    """
    recomputed = sum(block_bytes(model, layer, batch).values()) if batch.recompute else 0
    if not model.is_moe_layer(layer):
        return recomputed
    rows = batch.tokens * model.num_experts_per_tok
    return recomputed + rows * model.hidden_size * (2 * FLOAT32 + batch.compute_bytes)


def _sum(parts: list[dict[str, int]]) -> dict[str, int]:
    """Key by key."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: sum(part.get(key, 0) for part in parts) for key in keys}
