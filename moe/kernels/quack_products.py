"""Grouped products for `moe.kernels.fused` by QuACK (https://github.com/Dao-AILab/quack, quack-kernels 0.4): kernels in
CuTe for Hopper, with the gather and SwiGLU inside in both passes.

What QuACK chooses without tuning is not the fastest for fine experts, and its tuner waits for the device, so the tiles
are fixed here, by operation: the fastest of hundreds tried at six shapes (docs/performance.md). QuACK interleaves gate
and up in h, and takes stacked weights as they are ("concat").
"""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe.kernels.counting_sort import heaviest_first
from moe.kernels.rows import Rows

LONG = 2048
"""Reductions of at least this length hide the activation without a second tile at work (pingpong)."""


def up(x: Tensor, rows: Rows, w1: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, H) by w1 (E, 2, I, H) -> h: gate and up interleaved (N, 2 I), and silu(gate) * up (N, I)."""
    width = w1.shape[2]
    h, a = x.new_empty(rows.total, 2 * width), x.new_empty(rows.total, width)
    tile = _tile(128, 224) if x.shape[1] >= LONG else _tile(128, 192, pingpong=True)
    _quack().gated(
        x, w1.flatten(1, 2).mT, h, a, cu_seqlens_m=rows.bounds, A_idx=rows.token, config=tile, concat_layout=("B",)
    )
    return h, a


def down(a: Tensor, rows: Rows, w2: Tensor) -> Tensor:
    """a (N, I) by w2 (E, H, I) -> (N, H)."""
    y, tile = a.new_empty(rows.total, w2.shape[1]), _tile(128, 160, pingpong=True)
    _quack().plain(a, w2.mT, y, cu_seqlens_m=rows.bounds, config=tile, dynamic_scheduler=True)
    return y


def backward(
    dy: Tensor, h: Tensor, x: Tensor, rows: Rows, w1: Tensor, w2: Tensor, sums: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """dy (T, H), the gradient of the weighted sums -> those of the rows of x (N, H), of their weights (N,) where they
    have any, of w1 and of w2; with float32 `sums` these two are added to them instead. Overwrites h."""
    weighted, order = rows.weight is not None, heaviest_first(rows.bounds)
    a = h.new_empty(rows.total, w2.shape[2])
    dw1, dw2 = sums or (w1.new_empty(w1.shape), w2.new_empty(w2.shape))
    dweight = _quack().gated_backward(  # h is its own gradient from here on
        dy, w2, h, h, a, colvec_scale=rows.weight, colvec_reduce=weighted, cu_seqlens_m=rows.bounds, A_idx=rows.token,
        dynamic_scheduler=False, config=_tile(128, 128, pingpong=True),
    )  # fmt: skip
    _weight_gradient(dy, a, rows, order, dw2, add_to_output=bool(sums))
    del a
    dw1_of_h = dw1.view(len(w1), -1, x.shape[1]).mT
    _weight_gradient(x, h, rows, order, dw1_of_h, add_to_output=bool(sums), concat_layout=("out",))
    dx, tile = x.new_empty(rows.total, x.shape[1]), _tile(192, 128, pingpong=True, shared="rows")
    _quack().plain(h, w1.flatten(1, 2), dx, cu_seqlens_m=rows.bounds, config=tile, concat_layout=("B",))
    return dx, dweight if weighted else dy.new_empty(0, dtype=torch.float32), dw1, dw2


def _weight_gradient(tokens: Tensor, grad: Tensor, rows: Rows, order: Tensor, out: Tensor, **options: Any) -> None:
    """out (E, H, columns) = each expert's rows of `tokens` (T, H), transposed, by those of `grad` (N, columns).

    An expert's tiles take as long as it has rows: whichever multiprocessor is free takes the next, heaviest first.
    """
    _quack().plain(
        tokens.T, grad, out, cu_seqlens_k=rows.bounds, A_idx=rows.token, config=_tile(256, 192, shared=None, band=2),
        batch_idx_permute=order, dynamic_scheduler=True, **options,
    )  # fmt: skip


@functools.cache
def _quack() -> SimpleNamespace:
    interface: Any = importlib.import_module("quack.gemm_interface")
    return SimpleNamespace(
        plain=interface.gemm_tuned.fn,
        gated=interface.gemm_gated_tuned.fn,
        gated_backward=interface.gemm_dgated_tuned.fn,
    )


@functools.cache
def _tile(rows: int, columns: int, pingpong: bool = False, shared: str | None = "columns", band: int = 8) -> Any:
    """Two thread blocks share each load of the second operand ("columns"), of the first ("rows"), or none; tiles are
    taken in bands of `band`."""
    config: Any = importlib.import_module("quack.gemm_config")
    return config.GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        cluster_m=1 + (shared == "columns"),
        cluster_n=1 + (shared == "rows"),
        max_swizzle_size=band,
        is_dynamic_persistent=False,
    )
