#!/usr/bin/env bash
# Add the optional GPU packages to the environment of the `python` on the PATH: MegaBlocks (expert backend `megablocks`) and
# stanford-stk, which it imports. MegaBlocks 0.10.0 pins torch<2.7.1, which its grouped path does not need, so both go in without
# their pins; with no CUDA toolkit around, its own extension is left out and moe/kernels/megablocks.py stands in for it.
set -euo pipefail
python -c 'import torch; assert torch.cuda.is_available()' || echo "warning: torch sees no CUDA device here" >&2
python -m pip install --no-deps --no-build-isolation "megablocks==0.10.0" "stanford-stk==0.7.1"
python -c 'from moe.kernels.experts import available_backends; print("expert backends:", ", ".join(available_backends()))'
