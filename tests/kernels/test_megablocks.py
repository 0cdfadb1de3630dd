from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.kernels import megablocks
from moe.kernels.experts import describe_backend, expert_mlp, routed_experts
from moe.kernels.reference import moe_reference

RUNNABLE = megablocks.is_installed() and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
needs_megablocks = pytest.mark.skipif(not RUNNABLE, reason="needs MegaBlocks, and a GPU or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(st.lists(st.integers(0, 31), max_size=40), st.sampled_from([torch.int16, torch.int32, torch.int64]))
@settings(deadline=None)
def test_sort_and_histogram(values: list[int], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=dtype)
    x_out, iota_out = torch.empty_like(x), torch.empty_like(x)
    megablocks.sort(x, 5, x_out, iota_out)
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert iota_out.tolist() == order
    assert x_out.tolist() == sorted(values)
    counts = megablocks.histogram(x, 20)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [values.count(i) for i in range(20)]


def test_sort_reads_the_low_bits_only() -> None:
    x = torch.tensor([0b111, 0b1000, 0b1], dtype=torch.int32)
    x_out, iota_out = torch.empty_like(x), torch.empty_like(x)
    megablocks.sort(x, 3, x_out, iota_out)
    assert x_out.tolist() == [0b1000, 0b1, 0b111]
    assert iota_out.tolist() == [1, 2, 0]


def test_histogram_of_batches() -> None:
    x = torch.tensor([[0, 2, 2, -1], [1, 1, 1, 9]], dtype=torch.int32)
    assert megablocks.histogram(x, 3).tolist() == [[1, 0, 2], [0, 3, 0]]


def test_cumulative_sums() -> None:
    x = torch.tensor([[3, 0, 2], [1, 1, 4]], dtype=torch.int32)
    out = torch.empty_like(x)
    megablocks.inclusive_cumsum(x, 1, out)
    assert out.tolist() == [[3, 3, 5], [1, 2, 6]]
    megablocks.exclusive_cumsum(x, 1, out)
    assert out.tolist() == [[0, 3, 3], [0, 1, 2]]


def test_indices_of_block_diagonal_matrix() -> None:
    bins = torch.tensor([4, 4, 12], dtype=torch.int32)  # Blocks of 4 rows: one for bin 0, none for 1, two for 2.
    out = torch.empty(3 * 2, dtype=torch.int16)
    megablocks.indices(bins, 4, 3, 2, out)
    assert out.tolist() == [0, 1, 4, 5, 4, 5]


def test_replicate_and_its_transpose() -> None:
    bins = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, out = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.full((2, 6), -1.0)
    megablocks.replicate_forward(x, bins, out)
    assert out.tolist() == [[1, 1, 3, 3, 3, -1], [4, 4, 6, 6, 6, -1]]
    grad, sums = torch.arange(12.0).view(2, 6), torch.empty(2, 3)
    megablocks.replicate_backward(grad, bins, sums)
    assert sums.tolist() == [[1, 0, 9], [13, 0, 27]]


@pytest.mark.parametrize("into", [False, True])
def test_grouped_matmul(into: bool) -> None:
    sizes = torch.tensor([3, 0, 5])
    a, grad, weight = torch.randn(8, 16), torch.randn(8, 4), torch.randn(3, 16, 4)
    rows = [slice(0, 3), slice(3, 3), slice(3, 8)]
    forward = torch.cat([a[r] @ w for r, w in zip(rows, weight, strict=True)])
    weight_grad = torch.stack([a[r].T @ grad[r] for r in rows])

    def product(a: torch.Tensor, b: torch.Tensor, like: torch.Tensor, **flags: bool) -> torch.Tensor:
        c = torch.full_like(like, torch.nan) if into else None
        result = megablocks.grouped_matmul(a, b, sizes, c=c, **flags)
        return result if c is None else c

    torch.testing.assert_close(product(a, weight, forward), forward)
    torch.testing.assert_close(product(a, weight.mT.contiguous(), forward, trans_b=True), forward)
    torch.testing.assert_close(product(a, grad, weight_grad, trans_a=True), weight_grad)


def test_importing_the_kernels_imports_no_megablocks() -> None:
    program = "import sys, moe.kernels.experts; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(result.stdout.split())
    assert "moe.kernels.megablocks" in imported
    assert not {"megablocks", "stk", "megablocks_ops", "grouped_gemm"} & imported


def test_too_many_rows_for_32_bit_indices() -> None:
    tokens = torch.empty(1, device="meta").expand(2**20, 2048)
    experts = torch.empty(1, dtype=torch.int64, device="meta").expand(2**20, 2)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 .*, not 1048576 x 2 x 2048: use smaller micro-batches"):
        megablocks.dropless_experts(tokens, experts, experts, torch.empty(1), torch.empty(1), None)


def test_what_torch_stands_in_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_absent(name: str) -> None:
        raise ImportError(name)

    with monkeypatch.context() as patched:  # pytest imports as well
        patched.setattr(sys, "modules", dict(sys.modules))
        patched.setattr("moe.kernels.megablocks.importlib.import_module", is_absent)
        stand_ins = [
            *megablocks._provide("megablocks_ops", megablocks._megablocks_ops),
            *megablocks._provide("grouped_gemm", megablocks._grouped_gemm),
        ]
    assert len(stand_ins) == 8
    assert {"megablocks_ops.sort", "megablocks_ops.replicate_backward", "grouped_gemm.gmm"} <= {*stand_ins}
    monkeypatch.setattr(megablocks, "load", lambda: SimpleNamespace(stand_ins=stand_ins))
    assert "torch stands in for megablocks_ops.sort, " in describe_backend("megablocks")
    monkeypatch.setattr(megablocks, "load", lambda: SimpleNamespace(stand_ins=[]))
    assert describe_backend("megablocks") == "megablocks"
    assert describe_backend("loop") == "loop"


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter, which cannot time kernels, take their first configuration."""
    if DEVICE == "cpu":
        megablocks.load()
        kernels = importlib.import_module("megablocks.backend.kernels")
        for kernel in (kernels._padded_copy, kernels._padded_copy_wgrad):
            monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


@needs_megablocks
@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(7, 3), (8, 1), (1, 1)])
def test_dropless_layer_against_reference(dtype: torch.dtype, masked: bool, num_experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    tokens, hidden, width = 13, 32, 16
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :top_k].to(DEVICE)
    experts = torch.where(experts == 2, 0, experts)  # Expert 2 stays empty.
    valid = (torch.arange(tokens, device=DEVICE) % 4 != 1) if masked else None
    x = torch.randn(tokens, hidden, device=DEVICE)
    gate_up = torch.randn(num_experts, 2, width, hidden, device=DEVICE) * hidden**-0.5
    down = torch.randn(num_experts, hidden, width, device=DEVICE) * width**-0.5
    x, gate_up, down = (t.to(dtype).requires_grad_() for t in (x, gate_up, down))
    weights = torch.rand(tokens, top_k, device=DEVICE, requires_grad=True)
    leaves = (x, weights, gate_up, down)
    out = routed_experts(x, experts, weights, gate_up, down, "megablocks", valid)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    kept = experts if valid is None else torch.where(valid[:, None], experts, -1)
    expected = moe_reference(leaves64[0], kept, *leaves64[1:])
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.08
    for actual, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        typical = wanted.square().mean().sqrt()
        assert ((actual.double() - wanted).abs() <= tolerance * (wanted.abs() + typical)).all()
    if num_experts > 2:
        assert all((grad[2] == 0).all() for grad in grads[2:])


@needs_megablocks
@pytest.mark.parametrize("zero_tail", [False, True])
def test_sorted_rows_and_the_incoming_gradient_survive(zero_tail: bool) -> None:
    counts, used = torch.tensor([3, 0, 4], device=DEVICE), 7
    x = torch.randn(10 if zero_tail else used, 32, device=DEVICE, requires_grad=True)
    gate_up = torch.randn(3, 2, 16, 32, device=DEVICE, requires_grad=True)
    down = torch.randn(3, 32, 16, device=DEVICE)  # Frozen: MegaBlocks itself would refuse.
    out = expert_mlp(x, gate_up, down, counts, "megablocks", zero_tail)
    loop = expert_mlp(x, gate_up, down, counts, "loop")
    torch.testing.assert_close(out, loop, rtol=1e-4, atol=1e-4)
    # The same gradient tensor reaches both terms of the sum; overwriting it would change the other's.
    other = torch.zeros_like(out, requires_grad=True)
    grad = torch.randn_like(out)
    kept = grad.clone()
    grads = torch.autograd.grad(out + other, (x, gate_up, other), grad)
    assert torch.equal(grads[2], kept)
    for actual, wanted in zip(grads, torch.autograd.grad(loop, (x, gate_up), kept), strict=False):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(expert_mlp(x, gate_up, down, counts, "megablocks", zero_tail), out)
