from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.kernels import halves
from moe.kernels.attention import masked_attention
from moe.kernels.halves import in_float32, linear
from moe.model import LMHead


@pytest.fixture(params=[False, True], ids=["own products", "in float32"])
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """bfloat16 on a processor that multiplies it, and on one that does not."""
    monkeypatch.setattr(halves, "_multiplies_halves", lambda: not request.param)
    assert in_float32(torch.zeros(1, dtype=torch.bfloat16)) == request.param
    return torch.bfloat16


def test_only_half_precision_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_multiplies_halves", lambda: False)
    for dtype in (torch.float32, torch.float64, torch.int64):
        assert not in_float32(torch.zeros(1, dtype=dtype))
    assert in_float32(torch.zeros(1, dtype=torch.float16))
    assert not in_float32(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def rounded_once(result: Tensor, exact: Tensor) -> bool:
    """bfloat16 has 8 bits of significand; where terms cancel, what float32 loses counts."""
    return bool((result.double() - exact).abs().le(exact.abs() * 2**-8 + 1e-5).all())


def test_linear_rounds_once(half: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(*shape).to(half) for shape in ((3, 5, 96), (40, 96), (3, 5, 40)))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = linear(x, weight)
    out.backward(grad)
    wide = [t.detach().double() for t in (x, weight, grad)]
    assert out.dtype == x.grad.dtype == weight.grad.dtype == half  # type: ignore[union-attr]
    assert rounded_once(out, wide[0] @ wide[1].T)
    assert rounded_once(x.grad, wide[2] @ wide[1])  # type: ignore[arg-type]
    assert rounded_once(weight.grad, wide[2].flatten(0, 1).T @ wide[0].flatten(0, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_attention(half: torch.dtype, mask: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 16).to(half) for _ in range(3))
    seen = torch.ones(8, 8, dtype=torch.bool).tril()
    seen[5:, :2] = False
    given = {"none": None, "bool": seen, "added": torch.zeros(8, 8, dtype=half).masked_fill(~seen, -torch.inf)}[mask]
    wanted = seen if mask != "none" else torch.ones(8, 8, dtype=torch.bool).tril()
    scores = (q.double() @ k.double().mT / 4).masked_fill(~wanted, -torch.inf)
    out = masked_attention(q, k, v, given)
    assert out.dtype == half
    torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), atol=0.03, rtol=0)


def test_head(half: torch.dtype) -> None:
    torch.manual_seed(0)
    head = LMHead(32, 50, 1, chunk_size=4).to(half)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(2, 5, 32).to(half).requires_grad_()
    labels = torch.randint(50, (2, 5))
    head(hidden, labels, torch.zeros_like(labels)).total.backward()
    weight, wide = head.weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy((wide @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for result, exact in ((hidden.grad, wide.grad), (head.weight.grad, weight.grad)):
        assert result is not None
        assert exact is not None
        assert result.dtype == half
        # logits of size 6 rounded to bfloat16 are off by 0.01
        torch.testing.assert_close(result.double(), exact, atol=0.05 * exact.square().mean().sqrt().item(), rtol=0.03)
