"""The attention packages by their interface: stand-ins with their parameters' names compute with plain torch."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from document_helpers import attend, attend_backward
from torch import Tensor

from moe.kernels import attention
from moe.kernels.attention import flash_4, flash_4_backward, resolve_backend, row_attention, span_attention

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FLASH = [name for name in attention.BACKENDS if name != "sdpa"]
BOUNDS = [0, 3, 3, 8, 12, 12]


def spans_of(bounds: list[int]) -> list[slice]:
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def by_span(q: Tensor, k: Tensor, v: Tensor, bounds: list[int] = BOUNDS) -> Tensor:
    return attend(q, k, v, spans_of(bounds))[0]


def flat(bounds: Tensor | None, *tensors: Tensor) -> tuple[list[Tensor], list[slice]]:
    """Rows as spans of (N, heads, D)."""
    if bounds is not None:
        return list(tensors), spans_of(bounds.tolist())
    rows, length = tensors[0].shape[:2]
    return [t.flatten(0, 1) for t in tensors], spans_of(list(range(0, rows * length + 1, length)))


def compute(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, (B, heads, T) of rows."""
    parts, spans = flat(bounds, q, k, v)
    out, lse = attend(*parts, spans)
    return out.view(q.shape), lse if bounds is not None else lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()


def flash_2_or_3(pair: bool) -> ModuleType:
    module = ModuleType("stand-in")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, deterministic: bool) -> Any:
        assert causal
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        result = compute(q, k, v)
        return result if pair else result[0]

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, *, causal: bool, deterministic: bool
    ) -> Any:  # fmt: skip
        assert causal
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k == 5
        result = compute(q, k, v, cu_seqlens_q)
        return result if pair else result[0]

    vars(module).update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    return module


def flash_4_interface() -> ModuleType:
    module = ModuleType("stand-in")

    def _flash_attn_fwd(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert causal
        assert return_lse
        assert cu_seqlens_q is cu_seqlens_k
        assert (cu_seqlens_q is None) == (max_seqlen_q is None)
        out, lse = compute(q, k, v, cu_seqlens_q)
        return out.contiguous(), lse.float()

    def _flash_attn_bwd(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, causal: bool, deterministic: bool,
        dq: Tensor, dk: Tensor, dv: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None
    ) -> None:  # fmt: skip
        assert causal
        assert dout.is_contiguous()
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        again, sums = compute(q, k, v, cu_seqlens_q)
        torch.testing.assert_close((again, sums.float()), (out, lse))
        (grad, *parts), spans = flat(cu_seqlens_q, dout, q, k, v)
        for place, value in zip((dq, dk, dv), attend_backward(grad, *parts, spans), strict=True):
            place.copy_(value.view(place.shape))

    vars(module).update(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    return module


@pytest.fixture(autouse=True)
def _packages(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    package = flash_2_or_3(pair=False)
    package.__path__ = []
    modules = {
        "flash_attn": package,
        "flash_attn_interface": flash_2_or_3(pair=True),
        "flash_attn.cute": ModuleType("stand-in"),
        "flash_attn.cute.interface": flash_4_interface(),
    }
    modules["flash_attn.cute"].__path__ = []
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def inputs(*lead: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As the model hands them over: parts of one product, so that only the last two dimensions are dense."""
    torch.manual_seed(0)
    widths = [4 * 8, kv_heads * 8, kv_heads * 8]
    joined = torch.randn(*lead, sum(widths), dtype=dtype)
    return [part.unflatten(-1, (-1, 8)).requires_grad_() for part in joined.split(widths, dim=-1)]


def results(function: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
    out = function(*parts)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape[::-1]).permute(*range(out.dim())[::-1])
    return [out, *torch.autograd.grad(out, parts, grad)]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", FLASH)
def test_rows(backend: str, kv_heads: int) -> None:
    parts = inputs(2, 12, kv_heads=kv_heads)
    found = results(lambda *qkv: row_attention(*qkv, backend), parts)
    torch.testing.assert_close(found, results(lambda *qkv: row_attention(*qkv, "sdpa"), parts))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", FLASH)
def test_spans(backend: str, kv_heads: int) -> None:
    parts, bounds = inputs(12, kv_heads=kv_heads), torch.tensor(BOUNDS, dtype=torch.int32)
    found = results(lambda *qkv: span_attention(*qkv, bounds, 5, backend), parts)
    torch.testing.assert_close(found, results(lambda *qkv: by_span(*qkv), parts))


@pytest.mark.parametrize("backend", FLASH)
def test_deterministic_runs_ask_for_repeatable_gradients(backend: str) -> None:
    parts = inputs(2, 12)
    torch.use_deterministic_algorithms(True)
    try:
        results(lambda *qkv: row_attention(*qkv, backend), parts)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("spans", [False, True], ids=["rows", "spans"])
def test_operators_say_what_they_return(spans: bool) -> None:
    """Shapes, strides and gradients that compilers are told of are those that come out."""
    parts = inputs(12, dtype=torch.float32) if spans else inputs(2, 12, dtype=torch.float32)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32) if spans else None
    torch.library.opcheck(flash_4, (*parts, bounds, 5, False))
    parts = [part.detach() for part in parts]
    out, lse = flash_4(*parts, bounds, 5, False)
    dout = torch.randn(out.shape)
    torch.library.opcheck(flash_4_backward, (dout, *parts, out, lse, bounds, 5, False))


def test_compiled_code_is_one_graph_for_any_number_of_spans() -> None:
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        return span_attention(q, k, v, bounds, 12, "flash_attn_4")

    for bounds in (BOUNDS, [0, 12], [0, 1, 2, 12]):
        cuts = torch.tensor(bounds, dtype=torch.int32)
        torch._dynamo.mark_dynamic(cuts, 0)
        parts = inputs(12)
        found = results(lambda *qkv, cuts=cuts: compiled(*qkv, cuts), parts)
        torch.testing.assert_close(found, results(lambda *qkv, at=bounds: by_span(*qkv, at), parts))
    assert len(graphs) == 1


# ---- the choice


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def be(capability: int = 9, in_torch: bool = True, **versions: str) -> None:
        def version(package: str) -> str:
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 0))
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: in_torch)
        monkeypatch.setattr(attention.importlib.metadata, "version", version)
        find = lambda name: object() if name == "flash_attn_interface" and "flash_attn_3" in versions else None  # noqa: E731
        monkeypatch.setattr(attention.importlib.util, "find_spec", find)

    return be


@pytest.mark.parametrize(
    ("settings", "device", "dtype", "head_dim", "chosen"),
    [
        ({"flash-attn-4": "4.0.0b12"}, CUDA, torch.bfloat16, 128, "flash_attn_4"),
        ({"flash-attn-4": "4.1.0"}, CUDA, torch.bfloat16, 128, "sdpa"),
        ({"flash-attn-4": "4.0.0b12", "capability": 8}, CUDA, torch.bfloat16, 128, "sdpa"),
        ({"flash-attn-4": "4.0.0b12"}, CUDA, torch.float32, 128, "sdpa"),
        ({"flash-attn-4": "4.0.0b12"}, CUDA, torch.bfloat16, 192, "sdpa"),
        ({"flash-attn-4": "4.0.0b12"}, CPU, torch.bfloat16, 128, "sdpa"),
        ({"flash-attn": "2.8.3", "flash_attn_3": "yes"}, CUDA, torch.bfloat16, 128, "sdpa"),
        ({"flash-attn": "2.8.3", "in_torch": False}, CUDA, torch.bfloat16, 192, "flash_attn"),
        ({}, CUDA, torch.bfloat16, 128, "sdpa"),
    ],
)
def test_auto_takes_what_was_measured_to_be_fastest(
    settings: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    chosen: str,
    machine: Callable[..., None],
) -> None:
    machine(**settings)
    assert resolve_backend("auto", device, dtype, head_dim) == chosen


@pytest.mark.parametrize(
    ("name", "settings", "device", "dtype", "head_dim", "problem"),
    [
        ("flash", {}, CUDA, torch.bfloat16, 128, "is not one of auto, sdpa$"),
        ("flash_attn", {}, CUDA, torch.bfloat16, 128, "is not installed"),
        ("flash_attn_3", {"flash-attn": "2.8.3"}, CUDA, torch.bfloat16, 128, "is not installed"),
        ("flash_attn_4", {"flash-attn": "2.8.3"}, CUDA, torch.bfloat16, 128, "is not installed"),
        ("flash_attn", {"flash-attn": "2.8.3"}, CPU, torch.bfloat16, 128, "CUDA devices only"),
        ("flash_attn", {"flash-attn": "2.8.3"}, CUDA, torch.float32, 128, "takes bfloat16 or float16"),
        ("flash_attn", {"flash-attn": "2.8.3"}, CUDA, torch.bfloat16, 20, "multiple of 8"),
        ("flash_attn_3", {"flash_attn_3": "yes", "capability": 8}, CUDA, torch.bfloat16, 128, "Hopper"),
        ("flash_attn_4", {"flash-attn-4": "4.0.0b12"}, CUDA, torch.bfloat16, 192, "up to 128"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(
    name: str,
    settings: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    problem: str,
    machine: Callable[..., None],
) -> None:
    machine(**settings)
    with pytest.raises(ValueError, match=problem):
        resolve_backend(name, device, dtype, head_dim)
