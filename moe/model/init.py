"""Weights at step 0: every matrix normal with the paper's standard deviation, every norm's gain 1."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from moe.model.experts import GroupedExperts


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Fill all parameters in place.

    Every matrix, and of stacked experts every expert, draws from a stream of its own, keyed by the seed and its name: a
    value does not depend on which other parameters exist beside it, so neither a pipeline stage nor an expert shard
    changes it.
    """
    stacked = {
        f"{name}.{key}"
        for name, m in model.named_modules()
        if isinstance(m, GroupedExperts)
        for key, _ in m.named_parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif name in stacked:
            for expert, weights in enumerate(parameter):
                _normal(weights, std, f"{seed}/{name}/{expert}")
        else:
            _normal(parameter, std, f"{seed}/{name}")


def _normal(weights: Tensor, std: float, key: str) -> None:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(weights.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    weights.normal_(0.0, std, generator=generator)
