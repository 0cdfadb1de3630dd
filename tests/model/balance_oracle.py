"""The balance losses as the paper writes them, token by token, in Python loops (equations 12 to 17)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def frequencies(chosen: list[list[int]], num_experts: int) -> list[float]:
    """f_i (equation 13) of a sequence whose t-th token selects the experts chosen[t]."""
    length, active = len(chosen), len(chosen[0])
    return [
        num_experts / (active * length) * sum(1 for experts in chosen if expert in experts)
        for expert in range(num_experts)
    ]


def probabilities(scores: list[Tensor]) -> list[Tensor]:
    """P_i (equation 14) of a sequence whose t-th token has the scores s_t (E,)."""
    return [sum((s[expert] for s in scores), torch.zeros(())) / len(scores) for expert in range(len(scores[0]))]


def expert_level(f: list[float], p: list[Tensor], alpha: float) -> Tensor:
    """Equation 12."""
    total = torch.zeros((), dtype=torch.float64)
    for fi, pi in zip(f, p, strict=True):
        total = total + fi * pi
    return alpha * total


def device_level(f: list[float], p: list[Tensor], alpha: float, groups: int) -> Tensor:
    """Equations 15 to 17; consecutive experts, sizes as even as they go."""
    total = torch.zeros((), dtype=torch.float64)
    for members in np.array_split(np.arange(len(f)), groups):
        f_group = sum(f[i] for i in members) / len(members)
        p_group = sum((p[i] for i in members), torch.zeros(()))
        total = total + f_group * p_group
    return alpha * total


def token_sums(
    scores: Tensor, chosen: Tensor, valid: Tensor, alphas: tuple[float, float], groups: int, per_sequence: bool
) -> tuple[Tensor, Tensor]:
    """Both losses of scores (B, T, E) and choices (B, T, K), a sequence of n tokens counting n times, padding 0."""
    sequences = []
    for b in range(scores.shape[0]):
        kept = [t for t in range(scores.shape[1]) if valid[b, t]]
        sequences.append([(scores[b, t], chosen[b, t].tolist()) for t in kept])
    if not per_sequence:
        sequences = [[token for sequence in sequences for token in sequence]]
    expert, device = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sequence in sequences:
        if not sequence:
            continue
        f = frequencies([experts for _, experts in sequence], scores.shape[2])
        p = probabilities([s for s, _ in sequence])
        expert = expert + len(sequence) * expert_level(f, p, alphas[0])
        device = device + len(sequence) * device_level(f, p, alphas[1], groups)
    return expert, device
