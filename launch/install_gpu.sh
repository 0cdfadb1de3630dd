#!/usr/bin/env bash
# Add the optional GPU packages to the environment of the `python` on the PATH: QuACK (expert backend `quack`) and FlashAttention-4
# (attention backend `flash_attn_4`), in the versions whose interface is known, with the CuTe DSL they compile with; MegaBlocks (expert backend `megablocks`) and stanford-stk, which
# it imports. MegaBlocks 0.10.0 pins torch<2.7.1, which its grouped path does not need, so both go in without
# their pins. Its own CUDA extension does not compile against CUDA 13 (cub has changed) and needs a toolkit; where it
# does not build it is left out, and moe/kernels/megablocks.py stands in for it.
set -euo pipefail

if [[ $# -gt 0 ]]; then
    echo "usage: launch/install_gpu.sh    (no arguments; installs into the environment of the python on the PATH)" >&2
    exit 2
fi

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
python -m pip install --no-deps "quack-kernels==0.4.0" "flash-attn-4==4.0.0b12" "nvidia-cutlass-dsl==4.4.2" "nvidia-cutlass-dsl-libs-base==4.4.2" \
    "apache-tvm-ffi<0.2" torch-c-dlpack-ext || \
    echo "warning: QuACK and FlashAttention-4 do not install here; the backends triton and sdpa stand in for them" >&2
install "stanford-stk==0.7.1"
install "$megablocks" || install_without_extension
python -c 'from moe.kernels import attention, experts
print("expert backends:", ", ".join(experts.available_backends()))
print("attention backends:", ", ".join(attention.available_backends()))'
