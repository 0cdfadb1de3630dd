"""Batches of documents, and torch's packed attention kernel in plain torch, for machines without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from moe.model.attention import Documents

Rows = list[list[int]]
"""Lengths of the spans of each row, in order."""


def documents_of(rows: Rows) -> Documents:
    """What a loader would say of `rows`, with the bounds repeated to a multiple of 64 entries."""
    bounds = [0]
    for row in rows:
        for length in row:
            bounds.append(bounds[-1] + length)
    bounds += [bounds[-1]] * (-len(bounds) % 64)
    positions = [[place for length in row for place in range(length)] for row in rows]
    return Documents(torch.tensor(positions), torch.tensor(bounds, dtype=torch.int32), len(positions[0]))


def slices_of(rows: Rows) -> list[tuple[int, slice]]:
    """(row, columns) of every span."""
    places = []
    for index, row in enumerate(rows):
        start = 0
        for length in row:
            places.append((index, slice(start, start + length)))
            start += length
    return places


def run_packed_kernel_on_cpu() -> None:
    """From now on `varlen_attn` works on CPU tensors: its forward and backward operators loop over the spans."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *rest: Any):
    assert rest[0] is True, "causal"
    out, lse = attend(q, k, v, _spans(cu_seq_q, max_q))
    return out, lse.float(), torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int,
    *rest: Any
):  # fmt: skip
    return attend_backward(grad, q, k, v, _spans(cu_q, max_q))


def attend(q: Tensor, k: Tensor, v: Tensor, spans: list[slice]) -> tuple[Tensor, Tensor]:
    """(N, heads, D) x (N, kv_heads, D) -> (N, heads, D) and log-sum-exp (heads, N), causal within each span."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], q.shape[0]), torch.nan)
    for span in spans:
        scores = _scores(q[span], k[span])
        out[span] = torch.einsum("hts,shd->thd", scores.softmax(-1), v[span])
        lse[:, span] = scores.logsumexp(-1)
    return out, lse


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: list[slice]) -> tuple[Tensor, ...]:
    """Gradients of `attend`'s output for q, k and v, without autograd, which operators do not reach."""
    groups = q.shape[1] // k.shape[1]
    wide = [q, *(t.repeat_interleave(groups, dim=1) for t in (k, v))]
    grads = [torch.full_like(q, torch.nan) for _ in wide]
    for span in spans:
        own_q, own_k, own_v = (t[span] for t in wide)
        weights = _scores(own_q, own_k).softmax(-1)
        grad_weights = torch.einsum("thd,shd->hts", grad[span], own_v)
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
        grads[0][span] = torch.einsum("hts,shd->thd", grad_scores, own_k)
        grads[1][span] = torch.einsum("hts,thd->shd", grad_scores, own_q)
        grads[2][span] = torch.einsum("hts,thd->shd", weights, grad[span])
    return grads[0], *(t.unflatten(1, (-1, groups)).sum(2) for t in grads[1:])


def _spans(bounds: Tensor, longest: int) -> list[slice]:
    places = bounds.tolist()
    spans = [slice(a, b) for a, b in zip(places, places[1:], strict=False)]
    assert all(span.stop - span.start <= longest for span in spans)
    return spans


def _scores(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[2] ** -0.5
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf)
