"""The network once more in plain, slow torch: the oracle that the real one is tested against.

Written from the paper's equations alone, token by token and expert by expert, in the dtype of the weights it is given
(float64 in tests). It shares no code with the fast path.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.config.model import ModelConfig


def reference_logits(
    state: dict[str, Tensor], config: ModelConfig, input_ids: Tensor, document_starts: Tensor | None = None
) -> Tensor:
    """(B, T) ids -> (B, T, V) logits from a `Transformer` state dict. For learned routing without selection bias.

    `document_starts` (B, T) is True at tokens that open a document, which see nothing before them and have position 0
    (default: each row is one document).
    """
    starts = torch.zeros_like(input_ids) if document_starts is None else document_starts
    x = state["embed_tokens.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        part = {k.removeprefix(f"layers.{layer}."): v for k, v in state.items() if k.startswith(f"layers.{layer}.")}
        x = x + _attention(part, config, _norm(x, part["input_layernorm.weight"], config.rms_norm_eps), starts)
        u = _norm(x, part["post_attention_layernorm.weight"], config.rms_norm_eps)
        if config.is_moe_layer(layer):
            x = x + torch.stack([torch.stack([_mixture(part, config, token) for token in sequence]) for sequence in u])
        else:
            x = x + _swiglu(u, part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"], part["mlp.down_proj.weight"])
    return _norm(x, state["norm.weight"], config.rms_norm_eps) @ state["lm_head.weight"].T


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return gain * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    z = x @ gate.T
    return (z * torch.sigmoid(z) * (x @ up.T)) @ down.T


def _mixture(part: dict[str, Tensor], config: ModelConfig, u: Tensor) -> Tensor:
    """Equations 9 to 11 for one token (H,), without the residual."""
    logits = part["mlp.gate.weight"] @ u
    scores = torch.sigmoid(logits) if config.scoring_func == "sigmoid" else torch.softmax(logits, dim=0)
    chosen = sorted(range(config.n_routed_experts), key=lambda i: -scores[i].item())[: config.num_experts_per_tok]
    total = scores[chosen].sum() if config.norm_topk_prob else 1.0
    y = torch.zeros_like(u)
    for i in chosen:
        gate, up = part["mlp.experts.gate_up_proj"][i]
        y = y + scores[i] / total * _swiglu(u, gate, up, part["mlp.experts.down_proj"][i])
    if config.n_shared_experts:
        names = ("gate_proj", "up_proj", "down_proj")
        y = y + _swiglu(u, *(part[f"mlp.shared_experts.{name}.weight"] for name in names))
    return y


def _rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """(D,) at one position: dimension i turns with dimension i + D/2 by position * theta^(-2i/D)."""
    half = x.shape[0] // 2
    angles = position * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


def _attention(part: dict[str, Tensor], config: ModelConfig, x: Tensor, starts: Tensor) -> Tensor:
    heads, groups = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
    q, k, v = (
        (x @ part[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)) for name in ("q", "k", "v")
    )
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(heads):
            first, keys = 0, list[Tensor]()
            for t in range(x.shape[1]):
                if starts[b, t]:
                    first, keys = t, []
                keys.append(_rotate(k[b, t, h // groups], t - first, config.rope_theta))
                query = _rotate(q[b, t, h], t - first, config.rope_theta)
                attention = torch.softmax(torch.stack(keys) @ query / math.sqrt(config.head_dim), dim=0)
                out[b, t, h] = attention @ v[b, first : t + 1, h // groups]
    return out.flatten(-2) @ part["self_attn.o_proj.weight"].T
