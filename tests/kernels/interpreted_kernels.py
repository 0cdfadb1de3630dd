"""The fused layer's Triton kernels in Triton's interpreter, on the CPU; run by tests/kernels/test_interpreted.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moe.kernels import counting_sort, cross_entropy, router_product, up_projection
from moe.kernels.experts import expert_mlp, permuted_experts, routed_experts
from moe.kernels.permute import leading_rows, sort_by_expert
from moe.kernels.reference import moe_reference
from moe.kernels.rows import spread_rows, sum_rows, swiglu_backward
from moe.kernels.top_k import top_k

# Largest error allowed, relative to the root mean square of the tensor. A lost term costs about 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in every direction at sizes that the interpreter can bear."""
    monkeypatch.setattr(up_projection, "ROWS", 16)
    monkeypatch.setattr(up_projection, "COLUMNS", 16)
    monkeypatch.setattr(up_projection, "DEPTH", 16)
    monkeypatch.setattr(up_projection, "BAND", 2)
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)
    monkeypatch.setattr(counting_sort, "BLOCK", 16)
    monkeypatch.setattr(router_product, "BLOCK", 256)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch allocates without writing it holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_leaves(tokens: int, top_k: int, num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = (torch.rand(tokens, top_k, generator=generator) + 0.5).requires_grad_()
    x, gate_up = normal(tokens, hidden), normal(num_experts, 2, width, hidden) * hidden**-0.5
    down = normal(num_experts, hidden, width) * width**-0.5
    x, gate_up, down = (t.to(dtype).requires_grad_() for t in (x, gate_up, down))
    return [x, weights, gate_up, down]


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    scale = expected.double().square().mean().sqrt().clamp(min=0.05)
    assert ((actual.double() - expected.double()).abs() <= TOLERANCE[dtype] * (expected.double().abs() + scale)).all()


def assert_layer(
    experts: Tensor, leaves: list[Tensor], valid: Tensor | None = None, num_choices: int | None = None
) -> None:
    """Output and all gradients of the layer against fp64; what padding holds is poison."""
    x, weights, gate_up, down = leaves
    kept = torch.ones(len(x), dtype=torch.bool) if valid is None else valid
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    is_here = kept[:, None] & (experts < len(gate_up))
    expected = moe_reference(exact[0], torch.where(is_here, experts, -1), *exact[1:])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    x, weights = (t.detach().masked_fill(~kept[:, None], torch.nan).requires_grad_() for t in (x, weights))
    permutation = sort_by_expert(experts, len(gate_up), valid)
    if num_choices is not None:
        permutation = leading_rows(permutation, num_choices)
    out = permuted_experts(x, weights, permutation, gate_up, down, "triton")
    actual = [out, *torch.autograd.grad(out, (x, weights, gate_up, down), grad.masked_fill(~kept[:, None], torch.nan))]
    assert [t.dtype for t in actual] == [x.dtype, *(leaf.dtype for leaf in leaves)]
    for a, w in zip(actual, wanted, strict=True):
        assert_close(a, w, x.dtype)
    unused = [e for e in range(len(gate_up)) if not (experts[kept] == e).any()]
    assert all((t[unused] == 0).all() for t in actual[3:])
    assert all((t[~kept] == 0).all() for t in actual[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "hidden", "width"),
    [(40, 3, 5, 40, 24), (17, 1, 3, 16, 40), (5, 4, 9, 24, 8), (1, 1, 1, 8, 8)],
)
def test_layer(tokens: int, top_k: int, num_experts: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    experts = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :top_k]
    assert_layer(experts, make_leaves(tokens, top_k, num_experts, hidden, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hot", [0, 2, 4])
def test_one_hot_expert_and_empty_ones(hot: int, dtype: torch.dtype) -> None:
    assert_layer(torch.full((35, 1), hot), make_leaves(35, 1, 5, 24, 24, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_padding_that_holds_nan(share: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    experts, valid = torch.randint(4, (30, 2), generator=generator), torch.rand(30, generator=generator) < share
    assert_layer(experts, make_leaves(30, 2, 4, 24, 24, dtype), valid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("here", [1, 3])
def test_choices_of_experts_that_are_elsewhere(here: int, dtype: torch.dtype) -> None:
    experts = torch.randint(5, (30, 3), generator=torch.Generator().manual_seed(4)).clamp(max=here)
    assert_layer(experts, make_leaves(30, 3, here, 24, 16, dtype), num_choices=int((experts < here).sum()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_come_sorted(dtype: torch.dtype) -> None:
    counts = torch.tensor([7, 0, 20, 3])
    x, _, gate_up, down = make_leaves(30, 1, 4, 24, 16, dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, gate_up, down)]
    experts = torch.arange(4).repeat_interleave(counts)[:, None]
    expected = moe_reference(exact[0], experts, torch.ones(30, 1, dtype=torch.float64), *exact[1:])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = expert_mlp(x, gate_up, down, counts, "triton", zero_tail=False)
    actual = [out, *torch.autograd.grad(out, (x, gate_up, down), grad)]
    for a, w in zip(actual, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
        assert_close(a, w, dtype)


def test_no_rows_at_all() -> None:
    x, _, gate_up, down = make_leaves(0, 1, 4, 24, 16, torch.float32)
    out = expert_mlp(x, gate_up, down, torch.zeros(4, dtype=torch.int64), "triton", zero_tail=False)
    grads = torch.autograd.grad(out.sum(), (x, gate_up, down))
    assert out.shape == (0, 24)
    assert all((grad == 0).all() for grad in grads)


def test_no_token_at_all() -> None:
    leaves = make_leaves(0, 3, 4, 24, 16, torch.float32)
    x, weights, gate_up, down = leaves
    out = routed_experts(x, torch.zeros(0, 3, dtype=torch.int64), weights, gate_up, down, "triton")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (0, 24)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert all((grad == 0).all() for grad in grads)


def test_second_backward_pass_is_refused() -> None:
    x, weights, gate_up, down = make_leaves(9, 2, 3, 16, 16, torch.float32)
    out = routed_experts(x, torch.arange(18).view(9, 2) % 3, weights, gate_up, down, "triton")
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_gradients_are_added_to_sums(dtype: torch.dtype, compiled: bool) -> None:
    """Where sums are given these are what they were plus the gradients, and the weights get none."""
    leaves = make_leaves(30, 2, 5, 24, 16, dtype)
    generator = torch.Generator().manual_seed(3)
    experts, valid = torch.randint(4, (30, 2), generator=generator), torch.rand(30, generator=generator) < 0.7
    grad = torch.randn(leaves[0].shape, generator=generator).to(dtype)
    x, weights, *expected = gradients_of(routed_experts(leaves[0], experts, *leaves[1:], "triton", valid), leaves, grad)
    before = [torch.randn(weight.shape, generator=generator) for weight in leaves[2:]]
    sums = (before[0].clone(), before[1].clone())
    layer = torch.compile(routed_experts, fullgraph=True, backend="aot_eager") if compiled else routed_experts
    found = gradients_of(layer(leaves[0], experts, *leaves[1:], "triton", valid, sums), leaves, grad)
    assert found[2:] == [None, None]
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], weights)
    for total, old, part in zip(sums, before, expected, strict=True):
        assert torch.equal(total, old + part.float())
        assert not torch.equal(total, old)


def gradients_of(out: Tensor, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, grad, allow_unused=True))


def test_sums_that_would_be_lost_are_refused() -> None:
    leaves = make_leaves(9, 2, 3, 16, 16, torch.float16)
    experts, good = torch.arange(18).view(9, 2) % 3, tuple(torch.zeros(weight.shape) for weight in leaves[2:])
    for sums in ((good[1], good[0]), (good[0].half(), good[1]), (good[0], good[1].mT)):
        with pytest.raises(ValueError, match="contiguous float32 tensors of the weights' shapes"):
            routed_experts(leaves[0], experts, *leaves[1:], "triton", None, sums)
    with pytest.raises(ValueError, match="'grouped_mm' adds to no sums"):
        routed_experts(leaves[0], experts, *leaves[1:], "grouped_mm", None, good)


def test_no_rows_leave_sums_as_they_are() -> None:
    x, weights, gate_up, down = make_leaves(0, 3, 4, 24, 16, torch.float16)
    sums = (torch.ones(gate_up.shape), torch.ones(down.shape))
    out = routed_experts(x, torch.zeros(0, 3, dtype=torch.int64), weights, gate_up, down, "triton", None, sums)
    grads = gradients_of(out, [x, weights, gate_up, down], torch.zeros_like(out))
    assert grads[2:] == [None, None]
    assert all((total == 1).all() for total in sums)


def test_compiles_without_graph_breaks_for_any_number_of_tokens() -> None:
    compiled = torch.compile(routed_experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 14):
        leaves = make_leaves(tokens, 2, 3, 16, 16, torch.float32)
        experts = torch.arange(2 * tokens).view(tokens, 2) % 3
        results = []
        for layer in (compiled, routed_experts):
            out = layer(leaves[0], experts, *leaves[1:], "triton")
            results.append(torch.autograd.grad(out.square().sum(), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 520])
def test_row_sums_and_their_gradients(width: int, dtype: torch.dtype) -> None:
    experts, valid = torch.randint(4, (20, 3), generator=torch.Generator().manual_seed(4)), torch.arange(20) % 4 > 0
    permutation = sort_by_expert(experts, 4, valid)
    bounds, used = permutation.bounds, int(permutation.bounds[-1])
    rows, weights, grad = torch.randn(60, width).to(dtype), torch.rand(20, 3), torch.randn(20, width).to(dtype)
    rows[used:] = torch.nan
    chosen = torch.where(valid[:, None, None], rows[permutation.row_of_slot], 0).float()
    assert_close(sum_rows(rows, permutation.row_of_slot, bounds, weights), (chosen * weights[..., None]).sum(1), dtype)
    assert_close(sum_rows(rows, permutation.row_of_slot, bounds, None), chosen.sum(1), dtype)
    grad_rows, grad_weights = spread_rows(grad, rows, permutation.row_of_slot, bounds, weights)
    assert_close(grad_weights, (chosen * grad[:, None].float()).sum(-1), torch.float16)
    spread = (grad[:, None].float() * weights[..., None]).flatten(0, 1)[permutation.slot_of_row]
    assert_close(grad_rows[:used], spread[:used], dtype)


@pytest.mark.parametrize(("width", "weighted"), itertools.product([16, 520], [False, True]))
def test_swiglu_backward(width: int, weighted: bool) -> None:
    h, da = torch.randn(6, 2 * width), torch.randn(6, width)
    weight = torch.rand(6) if weighted else None
    leaves = [h.clone().requires_grad_(), torch.ones(6) if weight is None else weight.clone()]
    gate, up = leaves[0].chunk(2, 1)
    leaves[1].requires_grad_()
    a = torch.nn.functional.silu(gate) * up * leaves[1][:, None]
    wanted = torch.autograd.grad(a, leaves, da)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    before = h[5].clone(), da[5].clone()
    dweight = swiglu_backward(h, da, weight, bounds)
    assert_close(h[:5], wanted[0][:5], torch.float32)
    assert_close(da[:5], a.detach()[:5], torch.float32)
    assert torch.equal(h[5], before[0])
    assert torch.equal(da[5], before[1])
    if weighted:
        assert_close(dweight[:5], wanted[1][:5], torch.float32)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_keys"), [(1, 1, 1), (37, 3, 5), (16, 1, 4), (40, 2, 63), (9, 7, 7), (0, 2, 3), (3, 2, 300)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_counting_sort_is_the_stable_sort(tokens: int, top_k: int, num_keys: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(num_keys + 1, (tokens, top_k), generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    expected = sort_by_expert(keys, num_keys, valid)
    for actual, wanted in zip(counting_sort.counting_sort(keys, valid, num_keys), expected[:4], strict=True):
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual, wanted)


def test_counting_sort_puts_what_is_no_key_last() -> None:
    slot_of_row, _, _, bounds = counting_sort.counting_sort(torch.tensor([[2**32, 1], [-1, 0], [2, 1]]), None, 2)
    assert slot_of_row.tolist() == [3, 1, 5, 0, 2, 4]
    assert bounds.tolist() == [0, 1, 3]


def test_counting_sort_of_strided_inputs() -> None:
    keys, valid = torch.randint(5, (3, 40)).t(), (torch.rand(80) < 0.7)[::2]
    expected = sort_by_expert(keys, 5, valid)[:4]
    assert all(map(torch.equal, counting_sort.counting_sort(keys, valid, 5), expected))


@pytest.mark.parametrize("loads", [[3, 0, 9, 3, 1], [4], [0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_heaviest_first(loads: list[int]) -> None:
    bounds = torch.tensor([0, *itertools.accumulate(loads)], dtype=torch.int32)
    assert counting_sort.heaviest_first(bounds).tolist() == sorted(range(len(loads)), key=lambda e: -loads[e])


@pytest.mark.parametrize("masked", [False, True])
def test_counting_sort_is_described_to_compilers_as_it_is(masked: bool) -> None:
    valid = torch.rand(37) < 0.7 if masked else None
    torch.library.opcheck(counting_sort.counting_sort, (torch.randint(5, (37, 3)), valid, 5))


def make_product(tokens: int, hidden: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(experts, hidden, generator=generator) * hidden**-0.5).requires_grad_()
    return x, weight, torch.randn(tokens, experts, generator=generator)


@pytest.mark.parametrize(("tokens", "hidden", "experts"), [(50, 256, 63), (33, 72, 8), (1, 8, 1), (0, 16, 3)])
def test_splitting_a_product_loses_nothing_of_float32(tokens: int, hidden: int, experts: int) -> None:
    x, weight, grad = make_product(tokens, hidden, experts)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = x64 @ weight64.T
    wanted = torch.autograd.grad(expected, (x64, weight64), grad.double())
    out = router_product.router_product(x, weight)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), grad)
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(of_weight.double(), wanted[1], rtol=0, atol=2e-5)
    # half a unit in the last place, and what 16 bits leave
    assert ((of_x.double() - wanted[0]).abs() <= wanted[0].abs() * 2**-8 + 1e-4).all()
    assert ((of_x == wanted[0].bfloat16()) | (of_x.abs() < 1e-3)).float().mean() > 0.98 or not tokens


def test_two_bfloat16s_would_not_do() -> None:
    """The third part is what makes it float32, or the test above proves nothing."""
    x, weight, _ = make_product(50, 256, 63)
    high, again, middle, low = router_product._split_rows(weight.detach())[:, :63].double()
    assert torch.equal(high, again)
    assert torch.equal((high + middle + low).float(), weight)
    assert (x.double() @ (high + middle).T - x.double() @ weight.double().T).abs().max() > 4e-6


def test_split_product_of_strided_inputs() -> None:
    x, weight, _ = make_product(20, 32, 5)
    strided = [torch.stack([t.detach(), t.detach()], dim=-1)[..., 0].requires_grad_() for t in (x, weight)]
    found, wanted = (
        [out.detach(), *torch.autograd.grad(out.sum(), leaves)]  # whose gradient is one number, expanded
        for leaves in (strided, (x, weight))
        for out in [router_product.router_product(*leaves)]
    )
    assert all(map(torch.equal, found, wanted))
    torch.testing.assert_close(wanted[2], x.detach().float().sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_product_is_described_to_compilers_as_it_is(dtype: torch.dtype) -> None:
    x, weight, grad = (t.detach() for t in make_product(9, 32, 5))
    weight = weight.to(dtype)
    torch.library.opcheck(router_product.router_product, (x, weight))
    torch.library.opcheck(router_product._router_product_backward, (grad, x, weight))


def test_split_product_compiles_without_graph_breaks() -> None:
    x, weight, grad = make_product(8, 32, 5)
    compiled = torch.compile(router_product.router_product, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(router_product.router_product(x, weight), (x, weight), grad)
    actual = torch.autograd.grad(compiled(x, weight), (x, weight), grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("rows", "columns", "k"), [(37, 63, 7), (5, 64, 64), (1, 1, 1), (0, 5, 2), (3, 1500, 4)])
def test_largest_of_every_row(rows: int, columns: int, k: int) -> None:
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_k(scores, k), scores.sort(dim=1, descending=True, stable=True).indices[:, :k])


def test_largest_of_equals_infinities_and_nan() -> None:
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[1.0, 2, 2, 1, 2], [-inf, -1, -inf, 0, inf], [-nan, -inf, -inf, -inf, -nan]])
    assert top_k(scores, 4).tolist()[:2] == [[1, 2, 4, 0], [4, 3, 1, 0]]
    assert sorted(top_k(scores, 5)[2].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(9, 100), (5, 64), (4, 33), (3, 1), (0, 7)])
def test_cross_entropy_in_place(rows: int, columns: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(dtype)
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[:1], labels[1:2], labels[3:4] = columns - 1, 0, -100
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, ignore_index=-100, reduction="none")
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), exact)
    losses = cross_entropy.cross_entropy_(logits, labels, -100)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        logits.double(), wanted_grad, rtol=0, atol={torch.float32: 1e-6, torch.float16: 1e-3}[dtype]
    )
    assert not logits[labels == -100].any()


def test_cross_entropy_of_extreme_logits() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-1e4, -1e4, -1e4], [-torch.inf, 0.0, -torch.inf]])
    labels = torch.tensor([0, 1, 1])
    losses = cross_entropy.cross_entropy_(logits, labels, -100)
    torch.testing.assert_close(losses, torch.tensor([0.0, math.log(3), 0.0]))
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0, 0], [1 / 3, -2 / 3, 1 / 3], [0, 0, 0]]))


def test_cross_entropy_neither_spreads_what_is_ignored_nor_hides_a_label_that_there_is_not() -> None:
    logits = torch.tensor([[torch.nan, 1, 2], [0.0, 1, 2], [0.0, 1, 2]])
    losses = cross_entropy.cross_entropy_(logits, torch.tensor([-100, 3, -1]), -100)
    assert losses.isnan().tolist() == [False, True, True]
    assert losses[0] == 0
    assert not logits[0].any()
