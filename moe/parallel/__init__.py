"""How a model written for one device runs on many."""

from moe.parallel.parallelize import local, mark_last_micro_batch, parallelize
from moe.parallel.world import World, choose_device, join_world

__all__ = ["World", "choose_device", "join_world", "local", "mark_last_micro_batch", "parallelize"]
