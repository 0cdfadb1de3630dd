"""The network, written for one device."""

from moe.model.attention import Documents, KVCache
from moe.model.balance import RoutingStats, Tokens
from moe.model.experts import GroupedExperts, MoE
from moe.model.head import IGNORE_INDEX, LMHead, LossSums
from moe.model.init import initialise
from moe.model.mlp import MLP
from moe.model.transformer import Block, ModelOutput, Transformer

__all__ = [
    "IGNORE_INDEX",
    "MLP",
    "Block",
    "Documents",
    "GroupedExperts",
    "KVCache",
    "LMHead",
    "LossSums",
    "MoE",
    "ModelOutput",
    "RoutingStats",
    "Tokens",
    "Transformer",
    "initialise",
]
