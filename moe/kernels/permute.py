"""Move tokens to the rows their experts read, and back.

Rows are (token, choice) pairs ordered by expert. Every step is a stable sort, a gather or a sum over a token's own K
rows, without host synchronisation, and bitwise reproducible on every device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels import has_triton


class Permutation(NamedTuple):
    """Where each of the T * K slots (token t, choice k) lies once rows are sorted by expert.

    slot_of_row (T*K,) and row_of_slot (T, K) are inverse to each other, int64; token_of_row (T*K,) int32 is
    slot_of_row // K. bounds (E + 1,) int32: expert e has rows bounds[e] to bounds[e + 1]; padding has those from
    bounds[E] on. valid (T,) is False at padding tokens, None when there are none. Of `leading_rows` there are only so
    many rows, and row_of_slot of the other slots lies past them.
    """

    slot_of_row: Tensor
    token_of_row: Tensor
    row_of_slot: Tensor
    bounds: Tensor
    valid: Tensor | None

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) int64, padding excluded."""
        return self.bounds.diff().long()


def sort_by_expert(expert_indices: Tensor, num_experts: int, valid: Tensor | None = None) -> Permutation:
    """Order the slots of `expert_indices` (T, K) by expert, ties by token and choice; padding tokens come last.

    Entries lie in [0, num_experts]; those that are num_experts come last as padding does, and those of padding tokens
    (`valid` (T,) False) may hold anything.
    """
    if expert_indices.is_cuda and has_triton():
        from moe.kernels.counting_sort import counting_sort  # needs Triton

        slots, tokens, rows, bounds = counting_sort(expert_indices, valid, num_experts)
        return Permutation(slots, tokens, rows, bounds, valid)
    top_k = expert_indices.shape[1]
    experts = expert_indices if valid is None else torch.where(valid[:, None], expert_indices, num_experts)
    # Radix sort reads every byte of the key, so narrow keys are faster.
    sorted_experts, slot_of_row = experts.flatten().to(torch.int32).sort(stable=True)
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot.scatter_(0, slot_of_row, torch.arange(slot_of_row.numel(), device=slot_of_row.device))
    # Boundaries by binary search: bincount would synchronise with the host.
    expert_ids = torch.arange(num_experts + 1, dtype=torch.int32, device=experts.device)
    bounds = torch.searchsorted(sorted_experts, expert_ids, out_int32=True)
    token_of_row = (slot_of_row // top_k).to(torch.int32)
    return Permutation(slot_of_row, token_of_row, row_of_slot.view(-1, top_k), bounds, valid)


def gather_rows(x: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token to the rows of its experts: (T, H) -> (T*K, H).

    Padding rows are zero and send no gradient back. The backward pass sums a token's K rows in fp32 or better.
    """
    return _Gather.apply(_zero_padding(x, permutation.valid), permutation.token_of_row, permutation.row_of_slot)


def leading_rows(permutation: Permutation, rows: int) -> Permutation:
    """The first `rows` rows alone, which must be all that belong to experts: the other slots have none."""
    return permutation._replace(
        slot_of_row=permutation.slot_of_row[:rows], token_of_row=permutation.token_of_row[:rows], valid=None
    )


def add_rows(rows: Tensor, permutation: Permutation) -> Tensor:
    """The transpose of `gather_rows`: the sum of each token's rows, in fp32 or better, (rows, H) -> (T, H)."""
    return _Add.apply(rows, permutation.token_of_row, permutation.row_of_slot)


def combine_rows(y: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
    """Weighted sum of each token's K rows: y (T*K, H), weights (T, K) -> (T, H) in the dtype of y.

    Products and sums are taken in the dtype of `weights` (fp32). Padding tokens come out as zero, and neither their
    rows nor their weights receive a gradient, whatever they hold.
    """
    weights = _zero_padding(weights, permutation.valid)
    slot_of_row, token_of_row, row_of_slot = permutation[:3]
    return _zero_padding(_Combine.apply(y, weights, slot_of_row, token_of_row, row_of_slot), permutation.valid)


def _zero_padding(per_token: Tensor, valid: Tensor | None) -> Tensor:
    # A select, not a product: it also stops NaN, on both passes.
    return per_token if valid is None else torch.where(valid[:, None], per_token, 0)


def sum_of_rows(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[t] = sum over k of weights[t, k] * rows[row_of_slot[t, k]]: (N, H), (T, K) -> (T, H) in the dtype of rows.

    Slots without a row, which lie past the last, add nothing.
    """
    if rows.device.type != "cpu":
        return _sum_on_device(rows, row_of_slot, weights)
    rows, row_of_slot = _with_zero_row(rows, row_of_slot)
    # One pass without the (T, K, H) copy, 5 to 10 times faster on the CPU.
    table = rows if weights is None else rows.to(weights.dtype)
    return F.embedding_bag(row_of_slot, table, mode="sum", per_sample_weights=weights).to(rows.dtype)


def _sum_on_device(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling() or not has_triton():
        return _sum_of_copied_rows(rows, row_of_slot, weights)
    from moe.kernels.rows import sum_rows  # needs Triton

    return sum_rows(rows, row_of_slot, _all_of(rows), weights)


def _all_of(rows: Tensor) -> Tensor:
    """(1,) int32: their number, for kernels that leave out those of padding."""
    return torch.full((1,), len(rows), dtype=torch.int32, device=rows.device)


def _sum_of_copied_rows(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None = None) -> Tensor:
    rows, row_of_slot = _with_zero_row(rows, row_of_slot)
    # Plain operations: torch.compile fuses them into one kernel, and sums accumulate in fp32.
    chosen = rows[row_of_slot]  # (N, H) -> (T, K, H)
    if weights is not None:
        chosen = chosen * weights.unsqueeze(-1)
    return chosen.sum(dim=1).to(rows.dtype)


def _with_zero_row(rows: Tensor, row_of_slot: Tensor) -> tuple[Tensor, Tensor]:
    """For slots without a row, where there are any, one of zeros to read."""
    if row_of_slot.numel() == len(rows):
        return rows, row_of_slot
    zero = rows.new_zeros(1, *rows.shape[1:])
    return torch.cat([rows, zero]), row_of_slot.clamp(max=len(rows))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        return x.index_select(0, token_of_row)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (row_of_slot,) = ctx.saved_tensors
        return sum_of_rows(grad_rows, row_of_slot), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        return sum_of_rows(rows, row_of_slot)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return grad.index_select(0, token_of_row), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, weights: Tensor, slot_of_row: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        return sum_of_rows(y, row_of_slot, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y, weights, slot_of_row, token_of_row, row_of_slot = ctx.saved_tensors
        if y.device.type == "cuda" and not torch.compiler.is_compiling() and has_triton():
            from moe.kernels.rows import spread_rows  # needs Triton

            return *spread_rows(grad_out.contiguous(), y, row_of_slot, _all_of(y), weights), None, None, None
        grad_rows = grad_out.index_select(0, token_of_row).to(weights.dtype)  # (T, H) -> (T*K, H)
        grad_of_row, row_of_slot = _with_zero_row((grad_rows * y).sum(dim=1), row_of_slot)
        grad_weights = grad_of_row[row_of_slot]  # (T*K,) -> (T, K)
        weight_of_row = weights.flatten()[slot_of_row]
        grad_y = grad_rows.mul_(weight_of_row.unsqueeze(1)).to(y.dtype)
        return grad_y, grad_weights, None, None, None
