"""Cross-entropy and its gradient in the logits' own memory, in Triton: every row is read twice and written once."""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8
"""Columns of a row that a program holds, and its warps."""


def cross_entropy_(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """(n, V) contiguous logits, (n,) labels -> (n,) losses; the logits become the losses' gradients for them.

    Computed in float32. Both are 0 where the label is `ignored`; a label that there is not has a loss of NaN.
    """
    assert logits.is_contiguous(), "what is not in one piece cannot be replaced"
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block, labels = min(BLOCK, triton.next_power_of_2(columns)), labels.contiguous()
        _cross_entropy[(rows,)](logits, labels, losses, columns, IGNORED=ignored, BLOCK=block, num_warps=WARPS)
    return losses


@triton.jit
def _cross_entropy(logits, labels, losses, columns, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * columns
    label = tl.load(labels + row)
    scored = label != IGNORED
    exists = (label >= 0) & (label < columns)
    at_label = tl.load(begin + label, mask=exists, other=float("nan")).to(tl.float32)
    largest, total = -float("inf"), 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(begin + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        before, largest = largest, tl.maximum(largest, tl.max(x))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest))
    tl.store(losses + row, tl.where(scored, largest - at_label + tl.log(total), 0))
    scale = 1 / total
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(begin + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - largest) * scale - tl.where(column == label, 1.0, 0.0)
        grad = tl.where(scored, grad, 0.0)
        tl.store(begin + column, grad.to(logits.dtype.element_ty), mask=column < columns)
