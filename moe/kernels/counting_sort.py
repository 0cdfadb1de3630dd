"""Sorts by small integers in Triton, in a fraction of the launches and passes of a general sort.

    keys --count each block's--> (keys, blocks) --running sum--> where each block's keys end --each slot its row--> rows

Stable, and no program depends on another's pace, so that results are bitwise reproducible.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
"""Slots that a program takes: each is compared with all others of its block."""


@torch.library.custom_op("moesaic::counting_sort", mutates_args=())
def counting_sort(keys: Tensor, valid: Tensor | None, num_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order the slots of keys (T, K) by their key, ties by slot; last come those that are no key in [0, num_keys) and
    those of tokens that are not `valid` (T,).

    Returns the first four of `moe.kernels.permute.Permutation`.
    """
    slots, top_k = keys.numel(), keys.shape[1]
    slot_of_row, row_of_slot = (torch.empty(slots, dtype=torch.int64, device=keys.device) for _ in range(2))
    token_of_row = torch.empty(slots, dtype=torch.int32, device=keys.device)
    bounds = torch.zeros(num_keys + 1, dtype=torch.int32, device=keys.device)
    if slots:
        blocks, bins = triton.cdiv(slots, BLOCK), triton.next_power_of_2(num_keys + 1)
        counts = torch.empty(num_keys + 1, blocks, dtype=torch.int32, device=keys.device)
        arguments = (keys.contiguous(), keys if valid is None else valid.contiguous(), slots, num_keys)
        shapes = {"TOP_K": top_k, "MASKED": valid is not None, "BLOCK": BLOCK, "BINS": bins}
        _count[(blocks,)](*arguments, counts, **shapes)
        ends = counts.flatten().cumsum(0, dtype=torch.int32)
        _place[(blocks,)](*arguments, ends, slot_of_row, token_of_row, row_of_slot, bounds, **shapes)
    return slot_of_row, token_of_row, row_of_slot.view_as(keys), bounds


@counting_sort.register_fake
def _(keys: Tensor, valid: Tensor | None, num_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = keys.numel()
    return (
        keys.new_empty(slots, dtype=torch.int64),
        keys.new_empty(slots, dtype=torch.int32),
        keys.new_empty(keys.shape, dtype=torch.int64),
        keys.new_empty(num_keys + 1, dtype=torch.int32),
    )


def heaviest_first(bounds: Tensor) -> Tensor:
    """(E,) int32: experts by their load, whose rows lie between bounds (E + 1,); of equals the first."""
    experts = len(bounds) - 1
    order = bounds.new_empty(experts)
    _rank[(experts,)](bounds, order, experts, PADDED=triton.next_power_of_2(experts), num_warps=1)
    return order


@triton.jit
def _load_keys(keys, valid, slots, num_keys, TOP_K: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + slot, mask=slot < slots, other=-1)
    is_key = (key >= 0) & (key < num_keys)
    if MASKED:
        is_key &= tl.load(valid + slot // TOP_K, mask=slot < slots, other=0) != 0
    return slot, tl.where(is_key, key, num_keys).to(tl.int32)


@triton.jit
def _count(keys, valid, slots, num_keys, counts, TOP_K: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
           BINS: tl.constexpr):  # fmt: skip
    slot, key = _load_keys(keys, valid, slots, num_keys, TOP_K, MASKED, BLOCK)
    bins = tl.arange(0, BINS)
    place = bins * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + place, tl.histogram(key, BINS), mask=bins <= num_keys)


@triton.jit
def _place(keys, valid, slots, num_keys, ends, slot_of_row, token_of_row, row_of_slot, bounds, TOP_K: tl.constexpr,
           MASKED: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr):  # fmt: skip
    slot, key = _load_keys(keys, valid, slots, num_keys, TOP_K, MASKED, BLOCK)
    # What lies past the last slot counts among those that come last, behind all others: it takes no row of theirs.
    is_not_before = slot[None, :] >= slot[:, None]
    left = tl.sum(((key[:, None] == key[None, :]) & is_not_before).to(tl.int32), axis=1)
    row = tl.load(ends + key * tl.num_programs(0) + tl.program_id(0)) - left
    inside = slot < slots
    tl.store(row_of_slot + slot, row.to(tl.int64), mask=inside)
    tl.store(slot_of_row + row, slot.to(tl.int64), mask=inside)
    tl.store(token_of_row + row, slot // TOP_K, mask=inside)
    if tl.program_id(0) == 0:
        bins = tl.arange(0, BINS)
        last_block = (bins + 1) * tl.num_programs(0) - 1
        end = tl.load(ends + last_block, mask=bins < num_keys, other=0)
        tl.store(bounds + 1 + bins, end, mask=bins < num_keys)


@triton.jit
def _rank(bounds, order, experts, PADDED: tl.constexpr):
    own, other = tl.program_id(0), tl.arange(0, PADDED)
    inside = other < experts
    load = tl.load(bounds + other + 1, mask=inside, other=-1) - tl.load(bounds + other, mask=inside, other=0)
    own_load = tl.load(bounds + own + 1) - tl.load(bounds + own)
    goes_before = (load > own_load) | ((load == own_load) & (other < own))
    tl.store(order + tl.sum(goes_before.to(tl.int32)), own)
