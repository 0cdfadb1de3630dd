"""Weights at step 0: every matrix normal with the paper's standard deviation, every norm's gain 1."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe.model.experts import GroupedExperts, local
from moe.model.router import HashRouter, TopKRouter


@torch.no_grad()
def initialise(model: nn.Module, std: float, seed: int) -> None:
    """Fill all parameters and buffers in place; of sharded parameters the parts that are here.

    Every matrix, and of stacked experts every expert, draws from a stream of its own, keyed by the seed and its name: a
    value does not depend on which other parameters exist beside it, nor a layout or a pipeline stage change it.
    """
    stacked = {
        f"{name}.{key}"
        for name, m in model.named_modules()
        if isinstance(m, GroupedExperts)
        for key, _ in m.named_parameters()
    }
    for name, parameter in model.named_parameters():
        own, begins = local(parameter), _begins(parameter)
        if parameter.dim() == 1:
            own.fill_(1.0)
        elif name in stacked:
            for expert, weights in enumerate(own, begins[0]):
                _normal(weights, parameter.shape[1:], begins[1:], std, f"{seed}/{name}/{expert}")
        else:
            _normal(own, parameter.shape, begins, std, f"{seed}/{name}")
    for module in model.modules():
        if isinstance(module, TopKRouter | HashRouter):
            module.reset_buffers()


def _begins(parameter: Tensor) -> Sequence[int]:
    """Where in each dimension the part that is here begins."""
    if not isinstance(parameter, DTensor):
        return (0,) * parameter.dim()
    _, begins = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return begins


def _normal(own: Tensor, shape: torch.Size, begins: Sequence[int], std: float, key: str) -> None:
    """Fill `own`, the part from `begins` on of a matrix of `shape`, with what the whole would hold there."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator(own.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = own if own.shape == shape else own.new_empty(shape)
    whole.normal_(0.0, std, generator=generator)
    if whole is not own:
        own.copy_(whole[tuple(slice(begin, begin + size) for begin, size in zip(begins, own.shape, strict=True))])
