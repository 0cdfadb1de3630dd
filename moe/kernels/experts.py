"""The grouped SwiGLU MLPs of the routed experts, by one of several backends.

Weights are stacked: gate_up_proj (E, 2, I, H), index 0 the gate and 1 the up projection, and down_proj (E, H, I), so
that I can be sharded without interleaving. Under FSDP or tensor parallelism pass local tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels import megablocks
from moe.kernels.permute import combine_rows, gather_rows, sort_by_expert

BACKENDS = ("loop", "grouped_mm", "megablocks")
GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def available_backends() -> tuple[str, ...]:
    """Names that `expert_mlp` accepts with the packages installed here."""
    return BACKENDS if megablocks.is_installed() else BACKENDS[:2]


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, widths: Iterable[int] = ()) -> str:
    """Turn "auto" into the fastest backend for this device and dtype; check any other name.

    `widths` are the H and I to be used: "auto" avoids grouped_mm where they break its alignment rule. On the CPU
    grouped_mm is the faster one too, by 5-20 %. Raises ValueError for a backend that cannot run here.
    """
    device = torch.device(device)
    if name == "auto":
        return "grouped_mm" if _prefers_grouped_mm(device, dtype, widths) else "loop"
    available = ", ".join(("auto", *available_backends()))
    if name not in BACKENDS:
        raise ValueError(f"expert backend {name!r} is not one of {available}")
    if name not in available_backends():
        raise ValueError(f"{megablocks.MISSING}; available here: {available}")
    if name == "megablocks" and device.type != "cuda":
        raise ValueError(f"expert backend 'megablocks' runs on CUDA devices only, not on {device.type}")
    return name


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: (N, 2, I) -> (N, I)."""
    gate, up = gate_up.unbind(1)
    return F.silu(gate) * up


def expert_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    tokens_per_expert: Tensor,
    backend: str,
    zero_tail: bool = True,
) -> Tensor:
    """Apply expert e to its rows of `x`, which are sorted by expert: (N, H) -> (N, H).

    tokens_per_expert (E,) holds integers on the device of x. Their sum may be below N: the rows after it come out as
    zero and receive zero gradient, whatever they hold. `zero_tail=False` saves the passes over memory that this takes
    and leaves those rows undefined; it suits callers that have no such rows, or like `gather_rows` and `combine_rows`
    never look at them. An expert without rows gets a zero gradient.

    backend: "loop" (any dtype and width; copies the counts to the host), "grouped_mm" or "megablocks" (neither waits
    for the device). Raises ValueError for an unknown or absent backend, and for dtypes and widths that it cannot run.
    """
    if backend == "loop":
        return _loop_mlp(x, gate_up_proj, down_proj, tokens_per_expert)
    _check_grouped(backend, x.dtype, gate_up_proj.shape[-2:])
    grouped = _grouped_mm_mlp if backend == "grouped_mm" else megablocks.grouped_glu
    if not zero_tail:
        return grouped(x, gate_up_proj, down_proj, tokens_per_expert)
    used = (torch.arange(x.shape[0], device=x.device) < tokens_per_expert.sum()).unsqueeze(1)
    # Grouped GEMMs leave rows past the last offset uninitialised, in their output and in the gradient of x. A select
    # rather than a product on both sides: what lies there may be NaN.
    out = grouped(torch.where(used, x, 0), gate_up_proj, down_proj, tokens_per_expert)
    return torch.where(used, out, 0)


def routed_experts(
    x: Tensor,
    expert_indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: str,
    valid: Tensor | None = None,
) -> Tensor:
    """Route, compute and combine on one device: x (T, H), expert_indices and fp32 weights (T, K) -> (T, H).

    Padding tokens (`valid` (T,) False) come out as zero and receive no gradient. Backends and errors are those of
    `expert_mlp`; "megablocks" also permutes with MegaBlocks' own kernels.
    """
    if backend == "megablocks":
        _check_grouped(backend, x.dtype, gate_up_proj.shape[-2:])
        return megablocks.dropless_experts(x, expert_indices, weights, gate_up_proj, down_proj, valid)
    permutation = sort_by_expert(expert_indices, gate_up_proj.shape[0], valid)
    rows = gather_rows(x, permutation)
    rows = expert_mlp(rows, gate_up_proj, down_proj, permutation.tokens_per_expert, backend, zero_tail=False)
    return combine_rows(rows, weights, permutation)


def _loop_mlp(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, tokens_per_expert: Tensor) -> Tensor:
    counts = tokens_per_expert.tolist()
    *chunks, tail = x.split([*counts, x.shape[0] - sum(counts)])
    outputs = []
    for chunk, gate_up, down in zip(chunks, gate_up_proj.unbind(0), down_proj.unbind(0), strict=True):
        hidden = chunk @ gate_up.flatten(0, 1).T  # (n, H) -> (n, 2I)
        outputs.append(swiglu(hidden.unflatten(1, (2, -1))) @ down.T)  # (n, I) -> (n, H)
    return torch.cat([*outputs, torch.zeros_like(tail)])


def _grouped_mm_mlp(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, tokens_per_expert: Tensor) -> Tensor:
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    gate_up_weight = gate_up_proj.flatten(1, 2).transpose(1, 2)  # (E, 2, I, H) -> (E, H, 2I): one GEMM for both
    gate_up = F.grouped_mm(x, gate_up_weight, offs=ends).unflatten(1, (2, -1))  # (N, H) -> (N, 2, I)
    return F.grouped_mm(swiglu(gate_up), down_proj.transpose(1, 2), offs=ends)


def _prefers_grouped_mm(device: torch.device, dtype: torch.dtype, widths: Iterable[int]) -> bool:
    if dtype not in GROUPED_MM_DTYPES or any(width * dtype.itemsize % 16 for width in widths):
        return False
    # Elsewhere on CUDA torch runs a loop of its own, with a host synchronisation.
    return device.type == "cpu" or (
        device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def _check_grouped(backend: str, dtype: torch.dtype, widths: Iterable[int]) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"expert backend {backend!r} is not one of {', '.join(available_backends())}")
    if dtype not in GROUPED_MM_DTYPES:
        raise ValueError(f"expert backend {backend!r} runs bfloat16, float16 or float32, not {dtype}: use 'loop'")
    for width in widths:
        if width * dtype.itemsize % 16:
            multiple = 16 // dtype.itemsize
            raise ValueError(
                f"expert backend {backend!r} needs widths that are multiples of {multiple} in {dtype}, not {width}: "
                "change the width or use 'loop'"
            )
