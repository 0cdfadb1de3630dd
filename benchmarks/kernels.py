"""Check and time the expert backends on this machine: python benchmarks/kernels.py [--device cuda] [--tokens 32768].

Checks, in bf16 on unit-variance inputs: agreement with the fp64 reference under skewed routing with empty experts and
padding tokens, two runs equal to the bit, and no host synchronisation. Times are the median of 20 forward and backward
passes of the routed experts (sort, gather, GEMMs, combine; not the router) after 5 warm-ups, with unbalanced routing.
TFLOP/s count 18 T K H I.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe.kernels.experts import available_backends, routed_experts
from moe.kernels.reference import moe_reference


class Shape(NamedTuple):
    hidden: int
    width: int
    num_experts: int
    top_k: int


class Inputs(NamedTuple):
    x: Tensor
    experts: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor


SHAPES = {"2B": Shape(1280, 848, 63, 7), "16B": Shape(2048, 1408, 64, 6), "tiny": Shape(192, 96, 32, 6)}
# Allowed error in units of the fp64 value plus the root mean square of its token or expert; a lost term costs about 1.
TOLERANCE = 0.08

Layer = Callable[..., Tensor]


def make_inputs(shape: Shape, tokens: int, device: str, skew: float) -> Inputs:
    """Unit-variance bf16 inputs; expert scores fall by `skew` standard deviations from the first expert to the last."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    hidden, width, num_experts, top_k = shape
    scores = normal(tokens, num_experts) - torch.linspace(0, skew, num_experts, device=device)
    weights, experts = scores.softmax(1).topk(top_k)
    x = normal(tokens, hidden).bfloat16()
    gate_up = (normal(num_experts, 2, width, hidden) * hidden**-0.5).bfloat16()
    down = (normal(num_experts, hidden, width) * width**-0.5).bfloat16()
    leaves = (leaf.requires_grad_() for leaf in (weights * top_k, gate_up, down))
    return Inputs(x.requires_grad_(), experts, *leaves)


def forward_backward(layer: Layer, inputs: Inputs, *extra: object) -> list[Tensor]:
    """The output of `layer` and its gradients for x, weights, gate_up and down."""
    leaves = (inputs.x, inputs.weights, inputs.gate_up, inputs.down)
    out = layer(*inputs, *extra)
    return [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]


def worst_error(backend: str, shape: Shape, device: str) -> float:
    """Largest error in units of TOLERANCE's scale, over output and gradients; infinite where zeros are missing."""
    inputs = make_inputs(shape, 512, device, skew=12.0)
    valid = torch.arange(512, device=device) % 5 != 3
    actual = forward_backward(routed_experts, inputs, backend, valid)
    exact = [inputs.experts.where(valid[:, None], -1) if t is inputs.experts else t.detach().double() for t in inputs]
    x, experts, *rest = exact
    reference = Inputs(x.requires_grad_(), experts, *(t.requires_grad_() for t in rest))
    out = moe_reference(*reference)
    leaves = (reference.x, reference.weights, reference.gate_up, reference.down)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, actual[0].double())]
    used = torch.zeros(shape.num_experts, dtype=torch.bool, device=device)
    used[inputs.experts[valid].flatten()] = True
    zeros = [actual[3][~used], actual[4][~used], actual[0][~valid], actual[1][~valid]]
    if used.all() or any((t != 0).any() for t in zeros):
        return float("inf")
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over entries; dimension 0 counts tokens or experts. Entries that must be zero are left out."""
    actual, expected = actual.flatten(1), expected.flatten(1)
    scale = expected.abs() + expected.square().mean(1, keepdim=True).sqrt()
    return float(((actual - expected).abs() / scale)[scale > 0].max())


def is_deterministic(backend: str, inputs: Inputs) -> bool:
    """Whether two passes give the same bits."""
    first, second = (forward_backward(routed_experts, inputs, backend) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def synchronises(backend: str, inputs: Inputs) -> bool:
    """Whether a warm pass on CUDA waits for the device."""
    forward_backward(routed_experts, inputs, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward(routed_experts, inputs, backend)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def check(backend: str, shapes: list[Shape], device: str) -> bool:
    """Print one line of checks; True when all hold. Only "loop" may synchronise."""
    error = max(worst_error(backend, shape, device) for shape in shapes)
    inputs = make_inputs(shapes[0], 2048, device, skew=1.0)
    deterministic = is_deterministic(backend, inputs)
    syncs = device == "cuda" and synchronises(backend, inputs)
    good = error <= TOLERANCE and deterministic and (not syncs or backend == "loop")
    print(f"{backend:12} worst error {error:.4f} (allowed {TOLERANCE})   bitwise {deterministic}   host sync {syncs}")
    return good


def milliseconds(step: Callable[[], object], device: str) -> float:
    """Median time of 20 calls after 5 warm-ups."""
    times = []
    for _ in range(25):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[5:])


def time_layer(name: str, backend: str, compiled: bool, tokens: int, device: str) -> None:
    """Print one row: time, rate and peak memory beyond the inputs."""
    shape = SHAPES[name]
    inputs = make_inputs(shape, tokens, device, skew=1.0)
    layer: Layer = torch.compile(routed_experts) if compiled else routed_experts
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elapsed = milliseconds(lambda: forward_backward(layer, inputs, backend), device)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else float("nan")
    rate = 18 * tokens * shape.top_k * shape.hidden * shape.width / elapsed / 1e9
    label = f"{backend} compiled" if compiled else backend
    print(f"{name:5} {label:20} {elapsed:9.2f} {rate:9.1f} {peak:9.2f}", flush=True)


def main() -> int:
    """Run checks, then timings; 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["2B", "16B"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device here; use --device cpu", file=sys.stderr)
        return 1
    # MegaBlocks' Triton kernels run on CUDA only.
    backends = [name for name in available_backends() if args.device == "cuda" or name != "megablocks"]
    good = [check(backend, [SHAPES[name] for name in args.shapes], args.device) for backend in backends]
    print(f"\n{'shape':5} {'backend':20} {'ms':>9} {'TFLOP/s':>9} {'peak GiB':>9}   ({args.tokens} tokens)")
    for name in args.shapes:
        for backend in backends:
            time_layer(name, backend, False, args.tokens, args.device)
        if args.device == "cuda":
            time_layer(name, "grouped_mm", True, args.tokens, args.device)
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
