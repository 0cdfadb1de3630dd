"""Time causal attention, forward and backward: python -m benchmarks.attention [--json FILE].

In bfloat16, the median of 20 passes after 5. FLOPs are those of the causal half. The first rows are what `moe.model`
runs, without and with intra-document masking (documents of an eighth of a row); the others the kernels there are.
`error` is that of the output over fp64's, beside that of torch's own flash kernel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import milliseconds
from moe.model.attention import (
    ATTENTION_BACKENDS,
    Documents,
    Packed,
    causal_attention,
    document_mask,
    packed_attention,
)

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


SHAPES = {"16B, seq 4096": Shape(8, 16, 4096, 128), "2B, seq 2048": Shape(16, 10, 2048, 128)}


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(ATTENTION_BACKENDS, set_priority=True):
        return causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def ours_in_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, length = q.shape[:2]
    span = length // 8
    positions = (torch.arange(length, device=q.device) % span).expand(rows, length)
    bounds = torch.arange(0, rows * length + 1, span, device=q.device, dtype=torch.int32)
    mask = document_mask(Documents(positions, bounds, length), q.shape[-1], q.dtype)
    assert isinstance(mask, Packed)
    return packed_attention(q, k, v, mask)


def sdpa(backend: SDPBackend) -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            parts = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2)

    return run


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = importlib.import_module("flash_attn.cute").flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


KERNELS: dict[str, Kernel] = {
    "ours": ours,
    "ours, documents": ours_in_documents,
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "FlashAttention-4": flash_attention_4,
}


def measure(kernel: Kernel, shape: Shape) -> dict[str, float]:
    size = (shape.sequences, shape.length, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn(size, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        torch.autograd.grad(kernel(q, k, v), (q, k, v), grad)

    took = milliseconds(step)
    return {"milliseconds": took, "tflops": shape.flops() / took / 1e9}


def error(kernel: Kernel) -> float:
    """Of the output over its norm, at a small shape."""
    q, k, v = (torch.randn(2, 512, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    exact = causal_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return float((kernel(q, k, v).double() - exact).norm() / exact.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device here", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'shape':16} {'kernel':20} {'ms':>8} {'TFLOP/s':>8} {'error':>9}", flush=True)
    rows = []
    for label, shape in SHAPES.items():
        for name, kernel in KERNELS.items():
            torch.manual_seed(0)
            row: dict[str, object] = {"shape": label, "kernel": name}
            try:
                measured = measure(kernel, shape)
                wrong = error(kernel) if "documents" not in name else float("nan")
            except (ImportError, RuntimeError) as problem:
                print(f"{label:16} {name:20} {str(problem).splitlines()[0][:100]}", flush=True)
                rows.append(row | {"problem": str(problem).splitlines()[0]})
                continue
            print(
                f"{label:16} {name:20} {measured['milliseconds']:8.2f} {measured['tflops']:8.0f} {wrong:9.1e}",
                flush=True,
            )
            rows.append(row | measured | {"error": wrong})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
