"""Time the head with its loss, forward and backward, against other libraries': python -m benchmarks.head [--json FILE].

A micro-batch of hidden states in bfloat16 against a vocabulary, one label in ten ignored; the median of 20 passes after
5, beside FLOP/s of the three products (6 N H V) and the peak of memory above weight, hidden states and gradients. The
errors are those of both gradients against fp64, at a small shape. Packages that are not there are left out and named.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arguments import new_file, parse_on_gpu
from benchmarks.timing import measure
from moe.config.schema import RuntimeConfig
from moe.model import IGNORE_INDEX
from moe.model.head import LMHead, LossSums

Head = Callable[[Tensor, nn.Parameter, Tensor], Tensor]
"""(N, H) hidden states, (V, H) weight, (N,) labels -> the sum of the losses."""


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int

    def flops(self) -> int:
        return 6 * self.tokens * self.hidden * self.vocabulary


SHAPES = {"2B": Shape(65536, 1280, 8192), "16B": Shape(32768, 2048, 102400)}
SMALL = Shape(32768, 1280, 8192)
"""Several chunks, in which rounding adds up."""


def ours() -> Head:
    """`moe.model.head.LMHead`, in chunks of the default size."""
    head = LMHead(1, 1, 1, RuntimeConfig().chunk_size("cuda"))

    def run(hidden: Tensor, weight: nn.Parameter, labels: Tensor) -> Tensor:
        head.weight = weight
        loss: LossSums = head(hidden[None], labels[None], torch.zeros_like(labels)[None])
        return loss.total

    return run


def liger(accumulated: torch.dtype | None) -> Head:
    """liger-kernel's fused linear cross-entropy, its weight's gradient added up in `accumulated` (default: its own)."""
    package = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = package.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=accumulated)
    return lambda hidden, weight, labels: loss(weight, hidden, labels)


def quack() -> Head:
    """QuACK's, in its default chunks, without autotuning."""
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda hidden, weight, labels: function(
        hidden, weight, labels, ignore_index=IGNORE_INDEX, reduction="sum", tuned=False
    )


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once, the loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")


HEADS: dict[str, Callable[[], Head]] = {
    "ours": ours,
    "liger-kernel": lambda: liger(None),
    "liger-kernel, float32 sums": lambda: liger(torch.float32),
    "QuACK": quack,
    "all logits": lambda: plain,
    "all logits, compiled": lambda: torch.compile(plain),
}


def inputs(shape: Shape) -> tuple[Tensor, nn.Parameter, Tensor]:
    """Hidden states, weight and labels; logits of unit variance."""
    torch.manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(shape.vocabulary, shape.hidden, device="cuda", dtype=torch.bfloat16) * shape.hidden**-0.5
    labels = torch.randint(shape.vocabulary, (shape.tokens,), device="cuda")
    labels[::10] = IGNORE_INDEX
    return hidden.requires_grad_(), nn.Parameter(weight), labels


def time_head(name: str, shape: Shape) -> dict[str, object]:
    """One row; `problem` where the head does not run."""
    torch.compiler.reset()
    try:
        head = HEADS[name]()
        hidden, weight, labels = inputs(shape)
        one = torch.ones((), device="cuda")
        measured = measure(lambda x: head(x, weight, labels), [weight], hidden, one)
        wrong = errors(head)
    except Exception as error:  # a peer may fail in any way; the others are measured all the same
        return {"head": name, "problem": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    speed = shape.flops() / measured.milliseconds / 1e9
    return {"head": name, **measured._asdict(), "tflops": speed, "errors": wrong}


def errors(head: Head) -> list[float]:
    """Of the gradients of hidden states and weight, over their norms."""
    hidden, weight, labels = inputs(SMALL)
    found = torch.autograd.grad(head(hidden, weight, labels), (hidden, weight))
    parts = [part.detach().double().requires_grad_() for part in (hidden, weight)]
    loss = F.cross_entropy(F.linear(*parts), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    exact = torch.autograd.grad(loss, parts)
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def line(row: dict[str, object]) -> str:
    start = f"{row['shape']:6} {row['head']:28}"
    if "problem" in row:
        return f"{start} {row['problem']}"
    wrong = " ".join(f"{error:9.1e}" for error in row["errors"])  # type: ignore[attr-defined]
    return f"{start} {row['milliseconds']:8.2f} {row['tflops']:8.0f} {row['peak_gib']:9.2f} {wrong}  {row['waits']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parse_on_gpu(parser)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'shape':6} {'head':28} {'ms':>8} {'TFLOP/s':>8} {'peak GiB':>9} {'hidden':>9} {'weight':>9}  waits")
    rows = []
    for label, shape in SHAPES.items():
        for name in options.heads:
            rows.append({"shape": label} | time_head(name, shape))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
