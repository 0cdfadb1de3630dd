from __future__ import annotations

import torch

from moe.kernels import router_product as module
from moe.kernels.router_product import router_product


def make(tokens: int, hidden: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(experts, hidden, generator=generator) * hidden**-0.5).requires_grad_()
    return x, weight, torch.randn(tokens, experts, generator=generator)


def test_split_product_is_as_exact_as_a_float32_one() -> None:
    x, weight, grad = make(50, 256, 63)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = x64 @ weight64.T
    wanted = torch.autograd.grad(expected, (x64, weight64), grad.double())
    out = module._split_product(x, weight)
    of_x, of_weight = torch.autograd.grad(out, (x, weight), grad)
    assert (out.double() - expected).abs().max() < 2e-6
    assert (of_weight.double() - wanted[1]).abs().max() < 2e-5
    assert (out.dtype, of_x.dtype, of_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    # half a unit in the last place, and what 16 bits leave
    assert ((of_x.double() - wanted[0]).abs() <= wanted[0].abs() * 2**-8 + 1e-4).all()
    rounded = wanted[0].bfloat16()
    assert (of_x == rounded).float().mean() > 0.98


def test_two_bfloat16s_would_not_do() -> None:
    """The third part is what makes it float32, or the test above proves nothing."""
    x, weight, _ = make(50, 256, 63)
    two = sum((x.double() @ part.double().T for part in module._parts(weight.detach(), 2)), torch.zeros(()))
    assert (two - x.double() @ weight.double().T).abs().max() > 4e-6


def test_other_precisions_are_plain_products() -> None:
    x, weight, _ = make(8, 32, 5)
    assert torch.equal(router_product(x, weight), x.float() @ weight.T)
    assert router_product(x.double(), weight).dtype == torch.float64


def test_compiles_without_graph_breaks() -> None:
    x, weight, grad = make(8, 32, 5)
    compiled = torch.compile(module._split_product, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module._split_product(x, weight), (x, weight), grad)
    actual = torch.autograd.grad(compiled(x, weight), (x, weight), grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
