from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.kernels import permute
from moe.kernels.permute import Permutation, add_rows, combine_rows, gather_rows, leading_rows, sort_by_expert


def routing(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """(T, K) distinct experts a token, in no particular order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, num_experts, generator=generator).argsort(1)[:, :top_k]


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    num_experts=st.integers(1, 20),
    top_k=st.integers(1, 6),
    masked=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_sort_by_expert_against_python_sort(seed: int, tokens: int, num_experts: int, top_k: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Repeated experts in a token on purpose: hash routing may produce them.
    experts = torch.randint(num_experts, (tokens, top_k), generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.6 if masked else None
    permutation = sort_by_expert(experts, num_experts, valid)

    kept = [valid is None or bool(valid[t]) for t in range(tokens)]
    keys = [int(e) if kept[slot // top_k] else num_experts for slot, e in enumerate(experts.flatten())]
    slots = sorted(range(tokens * top_k), key=lambda slot: keys[slot])  # Python's sort is stable.
    assert permutation.slot_of_row.tolist() == slots
    assert permutation.token_of_row.tolist() == [slot // top_k for slot in slots]
    assert permutation.row_of_slot.shape == (tokens, top_k)
    assert [slots[row] for row in permutation.row_of_slot.flatten().tolist()] == list(range(tokens * top_k))
    assert permutation.tokens_per_expert.tolist() == [keys.count(e) for e in range(num_experts)]
    assert permutation.tokens_per_expert.dtype == torch.int64


def test_padding_tokens_may_hold_any_expert() -> None:
    experts = torch.tensor([[-7, 99], [1, 0]])
    permutation = sort_by_expert(experts, 2, torch.tensor([False, True]))
    assert permutation.tokens_per_expert.tolist() == [1, 1]
    assert permutation.token_of_row.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(9, 3, 5), (1, 1, 1), (6, 1, 4), (1, 4, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(tokens: int, top_k: int, num_experts: int, masked: bool) -> None:
    valid = torch.arange(tokens) % 3 != 1 if masked else None
    permutation = sort_by_expert(routing(tokens, top_k, num_experts), num_experts, valid)
    x = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens * top_k, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, permutation), (x,))
    assert torch.autograd.gradcheck(lambda y, w: combine_rows(y, w, permutation), (y, weights))


@pytest.mark.parametrize("rows", [0, 7, 18])
@pytest.mark.parametrize("is_copied", [False, True])
def test_leading_rows_leave_the_other_slots_out(rows: int, is_copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token twice, `rows` of the 18 slots are of expert 0 and the others of none."""
    if is_copied:
        monkeypatch.setattr(permute, "sum_of_rows", permute._sum_of_copied_rows)
    slots = torch.randperm(18, generator=torch.Generator().manual_seed(0)).view(9, 2)
    permutation = leading_rows(sort_by_expert((slots >= rows).long(), 1), rows)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    of_rows = torch.zeros(9, rows, dtype=torch.float64)
    of_rows[permutation.token_of_row, torch.arange(rows)] = 1
    torch.testing.assert_close(gather_rows(x, permutation), of_rows.T @ x)
    torch.testing.assert_close(add_rows(y, permutation), of_rows @ y)
    of_rows = of_rows * weights.flatten()[permutation.slot_of_row]
    torch.testing.assert_close(combine_rows(y, weights, permutation), of_rows @ y)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, permutation), (x,))
    assert torch.autograd.gradcheck(lambda y: add_rows(y, permutation), (y,))
    assert torch.autograd.gradcheck(lambda y, w: combine_rows(y, w, permutation), (y, weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "accelerator"])
def test_values_and_gradients_against_indexing(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "accelerator":
        monkeypatch.setattr(permute, "sum_of_rows", permute._sum_of_copied_rows)
    tokens, top_k, num_experts, hidden = 200, 6, 16, 24
    experts = routing(tokens, top_k, num_experts)
    permutation = sort_by_expert(experts, num_experts)
    weight_dtype = torch.promote_types(dtype, torch.float32)
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    y = torch.randn(tokens * top_k, hidden).to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k).to(weight_dtype).requires_grad_()
    grad_rows, grad_out = torch.randn_like(y), torch.randn_like(x)

    rows, out = gather_rows(x, permutation), combine_rows(y, weights, permutation)
    rows.backward(grad_rows)
    out.backward(grad_out)
    assert rows.dtype == out.dtype == dtype
    assert weights.grad is not None
    assert weights.grad.dtype == weight_dtype

    x64, y64, w64 = (t.detach().double().requires_grad_() for t in (x, y, weights))
    expected_rows = x64[permutation.token_of_row]
    expected_out = (y64[permutation.row_of_slot] * w64[..., None]).sum(1)
    expected_rows.backward(grad_rows.double())
    expected_out.backward(grad_out.double())
    # One rounding of the result, sums in fp32: half a unit in the last place of the largest value.
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 8 * torch.finfo(weight_dtype).eps}
    pairs = [(rows, expected_rows), (out, expected_out), (x.grad, x64.grad), (y.grad, y64.grad)]
    for actual, expected in pairs:
        torch.testing.assert_close(actual.double(), expected, **tolerance)
    torch.testing.assert_close(weights.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


def test_padding_contributes_nothing_even_when_it_is_nan() -> None:
    tokens, top_k, num_experts = 12, 3, 5
    valid = torch.arange(tokens) % 4 != 2
    permutation = sort_by_expert(routing(tokens, top_k, num_experts), num_experts, valid)
    used = int(permutation.tokens_per_expert.sum())
    x = torch.randn(tokens, 8).masked_fill_(~valid[:, None], torch.nan).requires_grad_()
    y = torch.randn(tokens * top_k, 8)
    y[used:] = torch.nan
    y.requires_grad_()
    weights = torch.rand(tokens, top_k).masked_fill_(~valid[:, None], torch.inf).requires_grad_()

    rows, out = gather_rows(x, permutation), combine_rows(y, weights, permutation)
    grad_rows = torch.randn_like(rows)
    grad_rows[used:] = torch.nan
    rows.backward(grad_rows)
    out.backward(torch.randn_like(out).masked_fill_(~valid[:, None], torch.nan))
    for per_row in (rows, y.grad):
        assert per_row.isfinite().all()
        assert (per_row[used:] == 0).all()
        assert (per_row[:used] != 0).any()
    for per_token in (out, x.grad, weights.grad):
        assert per_token.isfinite().all()
        assert (per_token[~valid] == 0).all()
        assert (per_token[valid] != 0).all()


def layer(x: Tensor, weights: Tensor, experts: Tensor, valid: Tensor | None) -> Tensor:
    permutation = sort_by_expert(experts, 8, valid)
    return combine_rows(gather_rows(x, permutation).sin(), weights, permutation)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_graph_breaks(masked: bool) -> None:
    x, weights = torch.randn(16, 8, requires_grad=True), torch.rand(16, 2, requires_grad=True)
    experts, valid = routing(16, 2, 8), torch.arange(16) < 11 if masked else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x, weights, experts, valid).sum(), (x, weights))
    actual = torch.autograd.grad(compiled(x, weights, experts, valid).sum(), (x, weights))
    torch.testing.assert_close(actual, expected)


def test_activation_checkpointing_changes_no_bit() -> None:
    x, weights = torch.randn(16, 8, requires_grad=True), torch.rand(16, 2, requires_grad=True)
    inputs = (x, weights, routing(16, 2, 8), None)
    expected = torch.autograd.grad(layer(*inputs).sum(), (x, weights))
    actual = torch.autograd.grad(checkpoint(layer, *inputs, use_reentrant=False).sum(), (x, weights))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_frozen_inputs_need_no_gradient() -> None:
    permutation: Permutation = sort_by_expert(routing(5, 2, 3), 3)
    y = torch.randn(10, 4, requires_grad=True)
    combine_rows(y, torch.rand(5, 2), permutation).sum().backward()
    assert y.grad is not None
    assert not gather_rows(torch.randn(5, 4), permutation).requires_grad
