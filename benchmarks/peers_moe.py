"""Mixture layers of other frameworks, each a module from (1, T, H) hidden states to the same, router included.

All get the same weights in scale, softmax scores without renormalisation, and no auxiliary loss. `build` raises
ImportError with the reason where a package is missing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.config.model import ModelConfig
from moe.kernels.experts import swiglu
from moe.model.experts import GroupedExperts
from moe.model.router import build_router

Layer = Callable[[Tensor], Tensor]


class Shape(NamedTuple):
    """One layer: hidden size, width of an expert, routed experts, experts a token."""

    hidden: int
    width: int
    experts: int
    top_k: int

    def flops(self, tokens: int) -> int:
        """Of forward and backward passes, router left out: three matrices, three products each."""
        return 18 * tokens * self.top_k * self.hidden * self.width


class Ours(nn.Module):
    """The router and the routed experts of `moe.model`, by one expert backend."""

    def __init__(self, shape: Shape, backend: str) -> None:
        super().__init__()
        config = ModelConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.width,
            n_routed_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )
        self.gate, self.experts = build_router(config), GroupedExperts(config, backend)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        routing = self.gate(flat, flat.new_zeros(len(flat), dtype=torch.int64))
        valid = torch.ones(len(flat), dtype=torch.bool, device=x.device)
        return self.experts.route(flat, routing, valid).view_as(x)


class Plain(nn.Module):
    """What one writes first: argsort, torch's grouped_mm, index_add."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Parameter(torch.empty(shape.experts, shape.hidden, dtype=torch.float32))
        self.gate_up = nn.Parameter(torch.empty(shape.experts, 2 * shape.width, shape.hidden))
        self.down = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.width))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, experts = F.linear(flat.float(), self.router).softmax(1).topk(self.top_k)
        order = experts.flatten().argsort(stable=True)
        ends = F.one_hot(experts.flatten(), len(self.router)).sum(0).cumsum(0).int()
        rows = flat[order // self.top_k]
        hidden = F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends).unflatten(1, (2, -1))
        rows = F.grouped_mm(swiglu(hidden), self.down.transpose(1, 2), offs=ends)
        weighted = rows * weights.flatten()[order, None].to(rows.dtype)
        return torch.zeros_like(flat).index_add(0, order // self.top_k, weighted).view_as(x)


def torchtitan(shape: Shape) -> nn.Module:
    """torchtitan's `MoE`, its gate in float32."""
    common = importlib.import_module("torchtitan.models.common.moe")
    linear = importlib.import_module("torchtitan.models.common.linear")
    dispatcher = importlib.import_module("torchtitan.models.common.token_dispatcher")
    experts = common.GroupedExperts.Config(dim=shape.hidden, hidden_dim=shape.width, num_experts=shape.experts)
    local = dispatcher.LocalTokenDispatcher.Config(num_experts=shape.experts, top_k=shape.top_k)
    router = common.TokenChoiceTopKRouter.Config(
        num_experts=shape.experts,
        gate=linear.Linear.Config(in_features=shape.hidden, out_features=shape.experts, bias=False),
        top_k=shape.top_k,
        score_func="softmax",
    )
    routed = common.RoutedExperts.Config(inner_experts=experts, token_dispatcher=local)
    config = common.MoE.Config(num_experts=shape.experts, routed_experts=routed, router=router, load_balance_coeff=None)
    return config.build()


class Sonic(nn.Module):
    """SonicMoE in its default configuration, without autotuning; its router is in the layer's precision."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        _use_quack_defaults()
        package = importlib.import_module("sonicmoe")
        kind = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
        self.layer = package.MoE(shape.experts, shape.top_k, shape.hidden, shape.width, kind, False, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@functools.cache
def _use_quack_defaults() -> None:
    interface = importlib.import_module("quack.gemm_interface")
    for name in ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned"):
        setattr(interface, name, _Untuned(getattr(interface, name).fn))


class _Untuned:
    """Stands where QuACK's autotuner stood and calls the function with its default configuration."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


class Qwen3(nn.Module):
    """transformers' Qwen3-MoE block with grouped_mm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        module = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        configuration = importlib.import_module("transformers").Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=False,
        )
        configuration._experts_implementation = "grouped_mm"
        self.block = module.Qwen3MoeSparseMoeBlock(configuration)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return out[0] if isinstance(out, tuple) else out


PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    "ours quack": functools.partial(Ours, backend="quack"),
    "ours triton": functools.partial(Ours, backend="triton"),
    "ours grouped_mm": functools.partial(Ours, backend="grouped_mm"),
    "MegaBlocks": functools.partial(Ours, backend="megablocks"),
    "SonicMoE": Sonic,
    "torchtitan": torchtitan,
    "transformers": Qwen3,
    "plain": Plain,
}
"""MegaBlocks' dropless layer behind our router; its blocks need no particular width on this path."""
COMPILED = ("ours quack", "ours triton", "ours grouped_mm", "SonicMoE", "torchtitan", "transformers", "plain")
"""Those that are measured under torch.compile as well."""


def build(name: str, shape: Shape) -> nn.Module:
    """The layer `name` on the GPU in bfloat16, routers in float32 where the peer keeps them so."""
    with torch.device("cuda"):
        layer = PEERS[name](shape).to("cuda")
    for key, parameter in layer.named_parameters():
        keeps_float32 = isinstance(layer, (Ours, Plain)) and (key.startswith("gate.") or key == "router")
        parameter.data = parameter.data.to(torch.float32 if keeps_float32 else torch.bfloat16)
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return layer.train()
