"""Time one mixture layer, router included, against other frameworks': python -m benchmarks.moe_layer [--json FILE].

Forward and backward passes at 32,768 tokens in bfloat16, real routing by an untrained router, in one process; medians
of 20 passes after 5 and their FLOP/s (18 T K H I): alone, each finding the device idle and waiting for the host's
launches, and behind one another, as in a training step. Beside them the peak of memory above parameters, inputs and
gradients. Packages that are not there are left out and named. `launch/install_gpu.sh` and docs/performance.md say how
to install them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable

import torch

from benchmarks.arguments import new_file, parse_on_gpu, positive
from benchmarks.peers_moe import COMPILED, PEERS, Shape, build
from benchmarks.timing import measure

SHAPES = {"16B": Shape(2048, 1408, 64, 6), "2B": Shape(1280, 848, 63, 7), "2B, E 64": Shape(1280, 848, 64, 7)}
HEADER = f"{'shape':10} {'layer':24} {'ms':>8} {'TFLOP/s':>8} {'queued':>8} {'TFLOP/s':>8} {'peak GiB':>9}  waits"


def time_layer(name: str, shape: Shape, tokens: int, compiled: bool) -> dict[str, object]:
    """One row; `problem` where the layer does not run."""
    torch.manual_seed(0)
    torch.compiler.reset()
    row: dict[str, object] = {"layer": f"{name}, compiled" if compiled else name, **shape._asdict(), "tokens": tokens}
    try:
        module = build(name, shape)
        x = torch.randn(1, tokens, shape.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        parameters = list(module.parameters())
        measured = measure(torch.compile(module) if compiled else module, parameters, x, torch.randn_like(x))
    except Exception as error:  # a peer may fail in any way; the others are measured all the same
        return row | {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    tflops = {
        "tflops": shape.flops(tokens) / measured.milliseconds / 1e9,
        "queued_tflops": shape.flops(tokens) / measured.queued_milliseconds / 1e9,
    }
    return row | measured._asdict() | tflops


def measure_shapes(shapes: dict[str, Shape], layers: Iterable[str], tokens: int) -> list[dict[str, object]]:
    """Measure and print every layer at every shape."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens} tokens\n{HEADER}", flush=True)
    rows = []
    for label, shape in shapes.items():
        for name in layers:
            for compiled in (False, True) if name in COMPILED else (False,):
                row = {"shape": label} | time_layer(name, shape, tokens, compiled)
                print(_line(row), flush=True)
                rows.append(row)
                torch.cuda.empty_cache()
    return rows


def _line(row: dict[str, object]) -> str:
    start = f"{row['shape']:10} {row['layer']:24}"
    if "problem" in row:
        return f"{start} {row['problem']}"
    speed = (
        f"{row['milliseconds']:8.2f} {row['tflops']:8.0f} {row['queued_milliseconds']:8.2f} {row['queued_tflops']:8.0f}"
    )
    return f"{start} {speed} {row['peak_gib']:9.2f}  {row['waits']}"


def run(description: str | None, shapes: dict[str, Shape]) -> int:
    """The command line of this benchmark and of `benchmarks.granularity`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=32768)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=list(shapes))
    parser.add_argument("--layers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=new_file, metavar="FILE")
    args = parse_on_gpu(parser)
    rows = measure_shapes({name: shapes[name] for name in args.shapes}, args.layers, args.tokens)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(__doc__, SHAPES))
