#!/usr/bin/env bash
# Add the optional GPU packages to the environment of the `python` on the PATH: QuACK (expert backend `quack`), in the version
# whose interface is known, with the CuTe DSL it compiles with; MegaBlocks (expert backend `megablocks`) and stanford-stk, which
# it imports. MegaBlocks 0.10.0 pins torch<2.7.1, which its grouped path does not need, so both go in without
# their pins. Its own CUDA extension does not compile against CUDA 13 (cub has changed) and needs a toolkit; where it
# does not build it is left out, and moe/kernels/megablocks.py stands in for it.
set -euo pipefail

megablocks="megablocks==0.10.0"
install() { python -m pip install --no-deps --no-build-isolation "$@"; }

install_without_extension() {
    echo "the CUDA extension of $megablocks does not build here; installing without it" >&2
    local sources
    sources=$(mktemp -d)
    trap 'rm -rf "$sources"' RETURN
    python -m pip download --no-deps --no-build-isolation --no-binary :all: --dest "$sources" "$megablocks"
    tar -xzf "$sources"/megablocks-*.tar.gz --strip-components=1 -C "$sources"
    sed -i 's/CUDA_HOME is not None/False/' "$sources/setup.py"
    install "$sources"
}

python -c 'import torch; assert torch.cuda.is_available()' || echo "warning: torch sees no CUDA device here" >&2
python -m pip install --no-deps "quack-kernels==0.4.0" "nvidia-cutlass-dsl==4.4.2" "nvidia-cutlass-dsl-libs-base==4.4.2" \
    "apache-tvm-ffi<0.2" torch-c-dlpack-ext || echo "warning: QuACK does not install here; backend triton stands in for it" >&2
install "stanford-stk==0.7.1"
install "$megablocks" || install_without_extension
python -c 'from moe.kernels.experts import available_backends; print("expert backends:", ", ".join(available_backends()))'
