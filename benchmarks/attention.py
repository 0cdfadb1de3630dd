"""Time causal attention, forward and backward: python -m benchmarks.attention [--json FILE].

In bfloat16, the median of 20 passes after 5. FLOPs are those of the whole causal half, also where documents, each an
eighth of a row, leave out most of it. Torch's kernels by name, then the values of `runtime.attention_backend` that are
installed, as `moe.model` calls them. `error` is the largest of output and gradients against fp64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.arguments import new_file, parse_on_gpu
from benchmarks.timing import milliseconds
from moe.kernels.attention import SDPA_ORDER, available_backends, masked_attention, row_attention, span_attention

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values (B, T, heads, D) -> (B, T, heads, D)."""


class Shape(NamedTuple):
    sequences: int
    heads: int
    length: int
    head_dim: int

    def flops(self) -> float:
        """Of both passes: seven products, of the causal half."""
        return 7 * self.sequences * self.heads * self.length**2 * self.head_dim


DOCUMENTS_A_ROW = 8
SHAPES = {"16B, seq 4096": Shape(8, 16, 4096, 128), "2B, seq 2048": Shape(16, 10, 2048, 128)}


def rows(backend: str) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPA_ORDER, set_priority=True):
            return row_attention(q, k, v, backend)

    return run


def documents(backend: str) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, span = q.shape[0] * q.shape[1], q.shape[1] // DOCUMENTS_A_ROW
        bounds = torch.arange(0, tokens + 1, span, device=q.device, dtype=torch.int32)
        parts = (t.flatten(0, 1) for t in (q, k, v))
        return span_attention(*parts, bounds, q.shape[1], backend).view(q.shape)

    return run


def sdpa(backend: SDPBackend) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            parts = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)

    return run


def kernels() -> dict[str, Kernel]:
    """By name; those of documents end in their number."""
    found = {f"SDPA {name}": sdpa(getattr(SDPBackend, f"{name.upper()}_ATTENTION")) for name in ("cudnn", "flash")}
    for name in available_backends():
        found[name] = rows(name)
        found[f"{name}, {DOCUMENTS_A_ROW} documents"] = documents(name)
    return found


def measure(kernel: Kernel, shape: Shape) -> dict[str, float]:
    size = (shape.sequences, shape.length, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn(size, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        torch.autograd.grad(kernel(q, k, v), (q, k, v), grad)

    took = milliseconds(step)
    return {"milliseconds": took, "tflops": shape.flops() / took / 1e9}


def error(kernel: Kernel) -> float:
    """The largest of output and gradients over their norms, at a small shape."""
    q, k, v = (torch.randn(2, 512, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    parts, exact_parts = ([t.to(dtype).requires_grad_() for t in (q, k, v)] for dtype in (q.dtype, torch.float64))
    exact = masked_attention(*(t.transpose(1, 2) for t in exact_parts)).transpose(1, 2)
    found = kernel(*parts)
    grad = torch.randn_like(found)
    pairs = [
        (found, exact),
        *zip(
            torch.autograd.grad(found, parts, grad),
            torch.autograd.grad(exact, exact_parts, grad.double()),
            strict=True,
        ),
    ]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parse_on_gpu(parser)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'shape':16} {'kernel':26} {'ms':>8} {'TFLOP/s':>8} {'error':>9}", flush=True)
    rows = []
    for label, shape in SHAPES.items():
        for name, kernel in kernels().items():
            torch.manual_seed(0)
            row: dict[str, object] = {"shape": label, "kernel": name}
            try:
                measured = measure(kernel, shape)
                wrong = error(kernel) if "documents" not in name else float("nan")
            except (ImportError, RuntimeError) as problem:
                print(f"{label:16} {name:26} {str(problem).splitlines()[0][:100]}", flush=True)
                rows.append(row | {"problem": str(problem).splitlines()[0]})
                continue
            print(
                f"{label:16} {name:26} {measured['milliseconds']:8.2f} {measured['tflops']:8.0f} {wrong:9.1e}",
                flush=True,
            )
            rows.append(row | measured | {"error": wrong})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
