"""How a model written for one device runs on many."""

from moe.model.experts import local
from moe.parallel.layout import Layout, legal_layouts, resolve
from moe.parallel.parallelize import copies, mark_last_micro_batch, parallelize, sum_token_gradients
from moe.parallel.watch import EXIT_PEER_FAILED, PeerFailure
from moe.parallel.world import World, build_world, choose_device, join_world

__all__ = [
    "EXIT_PEER_FAILED",
    "Layout",
    "PeerFailure",
    "World",
    "build_world",
    "choose_device",
    "copies",
    "join_world",
    "legal_layouts",
    "local",
    "mark_last_micro_batch",
    "parallelize",
    "resolve",
    "sum_token_gradients",
]
