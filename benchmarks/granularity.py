"""The price of fine experts: python -m benchmarks.granularity [--json FILE].

The same FLOPs cut into 1, 2, 4 and 8 times finer experts (hidden size 1280), measured like `benchmarks.moe_layer`.
"""

from __future__ import annotations

from benchmarks.moe_layer import run
from benchmarks.peers_moe import Shape

SHAPES = {f"m = {m}": Shape(1280, 3392 // m, 16 * m, 2 * m) for m in (1, 2, 4, 8)}

if __name__ == "__main__":
    raise SystemExit(run(__doc__, SHAPES))
