"""The experts' first matrix product in Triton, for Hopper: gather, gate and up projection, and SwiGLU in one kernel.

Tokens are read through the permutation as the product needs them, so that no gathered copy exists; weights come by the
tensor memory accelerator; the activation is made while gate and up are still in registers. Programs are persistent, as
many as the device runs at once, each taking tile after tile. Group sizes stay on the device.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH, STAGES, WARPS = 128, 128, 64, 4, 8
"""A tile's rows, its columns of gate and as many of up, the reduction's step, steps loaded ahead, warps. The fastest of
six cuts at all shapes measured (docs/performance.md)."""
BAND = 16
"""Row tiles that share the weights in the cache while they are at work."""


def up_projection(x: Tensor, index: Tensor | None, w1: Tensor, ends: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows x[index] of x (T, H), or all of them, by w1 (E, 2, I, H): expert e on rows ends[e - 1] to ends[e].

    Returns gate beside up (N, 2 I) and silu(gate) * up (N, I), both undefined after ends[-1].
    """
    experts, _, width, hidden = w1.shape
    h, a = x.new_empty(num_rows, 2 * width), x.new_empty(num_rows, width)
    if not num_rows:
        return h, a
    tiles, bound = _list_row_tiles(ends, num_rows)
    programs = min(_programs(x.device), bound * triton.cdiv(width, COLUMNS))
    _up_projection[(programs,)](
        x, x if index is None else index, TensorDescriptor.from_tensor(w1.view(-1, hidden), [COLUMNS, DEPTH]), h, a,
        *tiles, ends, HIDDEN=hidden, WIDTH=width, INDEXED=index is not None,
        BM=ROWS, BN=COLUMNS, BK=DEPTH, BAND=BAND, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return h, a


def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class RowTiles(NamedTuple):
    """The experts' rows cut into tiles, expert by expert."""

    expert: Tensor
    """(bound,) int32."""
    first_row: Tensor
    """(bound,) int32."""
    number: Tensor
    """(1,) int32: how many there are."""


def _list_row_tiles(ends: Tensor, num_rows: int) -> tuple[RowTiles, int]:
    """Every expert's rows in tiles of ROWS, and the number that no routing exceeds."""
    experts = len(ends)
    bound = num_rows // ROWS + experts
    tiles = RowTiles(ends.new_empty(bound), ends.new_empty(bound), ends.new_empty(1))
    _list_tiles[(experts,)](ends, *tiles, experts, PADDED=triton.next_power_of_2(experts), BM=ROWS)
    return tiles, bound


@triton.jit
def _list_tiles(ends, expert, first_row, count, EXPERTS, PADDED: tl.constexpr, BM: tl.constexpr):
    own = tl.program_id(0)
    ids = tl.arange(0, PADDED)
    last = tl.load(ends + ids, mask=ids < EXPERTS, other=0)
    first = tl.load(ends + ids - 1, mask=(ids > 0) & (ids < EXPERTS), other=0)
    tiles = tl.where(ids < EXPERTS, (last - first + BM - 1) // BM, 0)
    before = tl.sum(tl.where(ids < own, tiles, 0))
    start = tl.sum(tl.where(ids == own, first, 0))
    for i in range(tl.sum(tl.where(ids == own, tiles, 0))):
        tl.store(expert + before + i, own)
        tl.store(first_row + before + i, start + i * BM)
    if own == 0:
        tl.store(count, tl.sum(tiles))


@triton.jit
def _place(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """Tile number -> (m, n), down the columns of bands of BAND row tiles."""
    band = tile // (BAND * tiles_n)
    height = min(tiles_m - band * BAND, BAND)
    within = tile % (BAND * tiles_n)
    return band * BAND + within % height, within // height


@triton.jit
def _up_projection(x, index, w1, h, a, expert, first_row, count, ends, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
                   INDEXED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   BAND: tl.constexpr):  # fmt: skip
    tiles_n: tl.constexpr = (WIDTH + BN - 1) // BN
    tiles_m = tl.load(count)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = _place(tile, tiles_m, tiles_n, BAND)
        e = tl.load(expert + m)
        rows = tl.load(first_row + m) + tl.arange(0, BM)
        mine = rows < tl.load(ends + e)
        # rows of other experts would be computed in vain; the first token's stand in for them
        source = tl.load(index + rows, mask=mine, other=0) if INDEXED else tl.where(mine, rows, 0)
        at_x = x + source.to(tl.int64)[:, None] * HIDDEN
        gate, up = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
        for k in range(0, HIDDEN, BK):
            depth = k + tl.arange(0, BK)
            if HIDDEN % BK == 0:
                block = tl.load(at_x + depth[None, :])
            else:
                block = tl.load(at_x + depth[None, :], mask=(depth < HIDDEN)[None, :], other=0)
            gate = tl.dot(block, w1.load([e * 2 * WIDTH + n * BN, k]).T, gate, input_precision="ieee")
            up = tl.dot(block, w1.load([(e * 2 + 1) * WIDTH + n * BN, k]).T, up, input_precision="ieee")
        columns = n * BN + tl.arange(0, BN)
        inside = mine[:, None] & (columns < WIDTH)[None, :]
        at_h = h + rows.to(tl.int64)[:, None] * (2 * WIDTH) + columns[None, :]
        tl.store(at_h, gate.to(h.dtype.element_ty), mask=inside)
        tl.store(at_h + WIDTH, up.to(h.dtype.element_ty), mask=inside)
        hidden = gate * tl.sigmoid(gate) * up
        tl.store(a + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :], hidden.to(a.dtype.element_ty), mask=inside)
