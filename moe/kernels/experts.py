"""The grouped SwiGLU MLPs of the routed experts, by one of several backends.

Weights are stacked: gate_up_proj (E, 2, I, H), index 0 the gate and 1 the up projection, and down_proj (E, H, I), so
that I can be sharded without interleaving. Under FSDP or tensor parallelism pass local tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.kernels import has_quack, has_triton, megablocks
from moe.kernels.permute import Permutation, combine_rows, gather_rows, sort_by_expert

BACKENDS = ("loop", "grouped_mm", "triton", "quack", "megablocks")
FUSED = ("triton", "quack")
"""Those that take the whole layer, permutation included, as one operator (`moe.kernels.fused`)."""
GROUPED_MM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def available_backends() -> tuple[str, ...]:
    """Names that `expert_mlp` accepts with the packages installed here. Imports none of them."""
    return tuple(name for name in BACKENDS if _is_installed(name))


@torch.compiler.assume_constant_result  # compiled code need not look again
def _is_installed(backend: str) -> bool:
    if backend == "megablocks":
        return megablocks.is_installed()
    if backend not in FUSED:
        return True
    return has_triton() and (backend == "triton" or has_quack())


def _runs_on(backend: str, device: torch.device) -> bool:
    if backend in FUSED:
        return _is_hopper(device)
    return backend != "megablocks" or device.type == "cuda"


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype, widths: Iterable[int] = ()) -> str:
    """Turn "auto" into the fastest backend for this device and dtype; check any other name.

    On Hopper that is "quack" where installed, else "triton" (docs/performance.md has the figures); elsewhere
    grouped_mm, on the CPU too, by 5-20 %. `widths` are the H and I to be used: "auto" avoids grouped products where
    they break their alignment rule. Raises ValueError for a backend that cannot run here.
    """
    device, widths = torch.device(device), tuple(widths)
    if name == "auto":
        return _fastest(device, dtype, widths)
    available = ", ".join(("auto", *(backend for backend in available_backends() if _runs_on(backend, device))))
    if name not in BACKENDS:
        raise ValueError(f"expert backend {name!r} is not one of {available}")
    if name not in available_backends():
        raise ValueError(f"{_missing(name)}; available here: {available}")
    if not _runs_on(name, device):
        kind = "Hopper GPUs" if name in FUSED else "CUDA devices"
        raise ValueError(f"expert backend {name!r} runs on {kind} only; available here: {available}")
    if name != "loop":
        _check_grouped(name, dtype, widths)
    return name


def describe_backend(name: str) -> str:
    """The name, and the compiled functions of its package that torch stands in for. Loads the package."""
    stand_ins = megablocks.load().stand_ins if name == "megablocks" else []
    return f"{name} (torch stands in for {', '.join(stand_ins)})" if stand_ins else name


def _missing(backend: str) -> str:
    return f"expert backend {backend!r} is not installed: run launch/install_gpu.sh"


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


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

    backend: "loop" (any dtype and width; copies the counts to the host) or one of the others, none of which waits for
    the device. Raises ValueError for an unknown or absent backend, and for dtypes and widths that it cannot run.
    """
    if backend == "loop":
        return _loop_mlp(x, gate_up_proj, down_proj, tokens_per_expert)
    _check_grouped(backend, x.dtype, gate_up_proj.shape[-2:])
    if not zero_tail:
        return _grouped_mlp(x, gate_up_proj, down_proj, tokens_per_expert, backend)
    used = (torch.arange(x.shape[0], device=x.device) < tokens_per_expert.sum()).unsqueeze(1)
    # Grouped GEMMs leave rows past the last offset uninitialised, in their output and in the gradient of x. A select
    # rather than a product on both sides: what lies there may be NaN.
    out = _grouped_mlp(torch.where(used, x, 0), gate_up_proj, down_proj, tokens_per_expert, backend)
    return torch.where(used, out, 0)


def routed_experts(
    x: Tensor,
    expert_indices: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: str,
    valid: Tensor | None = None,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Route, compute and combine on one device: x (T, H), expert_indices and fp32 weights (T, K) -> (T, H).

    Padding tokens (`valid` (T,) False) come out as zero and receive no gradient. Backends and errors are those of
    `expert_mlp`; "megablocks" also permutes with MegaBlocks' own kernels. FUSED ones allow one backward pass only, and
    add the gradients of gate_up_proj and down_proj to `sums`, contiguous float32 tensors of their shapes, where given:
    these parameters then get none. ValueError for other sums, and for sums with other backends.
    """
    if backend == "megablocks":
        _check_sums(sums, (gate_up_proj, down_proj), backend)
        _check_grouped(backend, x.dtype, gate_up_proj.shape[-2:])
        return megablocks.dropless_experts(x, expert_indices, weights, gate_up_proj, down_proj, valid)
    permutation = sort_by_expert(expert_indices, gate_up_proj.shape[0], valid)
    return permuted_experts(x, weights, permutation, gate_up_proj, down_proj, backend, sums)


def permuted_experts(
    x: Tensor,
    weights: Tensor,
    permutation: Permutation,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: str,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `routed_experts`, of choices that are sorted already; those of experts elsewhere have no row."""
    _check_sums(sums, (gate_up_proj, down_proj), backend)
    if backend != "loop":
        _check_grouped(backend, x.dtype, gate_up_proj.shape[-2:])
    if backend in FUSED:
        weight_of_row = weights.detach().flatten()[permutation.slot_of_row].float()
        places = permutation.token_of_row, weight_of_row, permutation.row_of_slot
        return _fused(x, weights, places, permutation.bounds, gate_up_proj, down_proj, backend, sums)
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


def _grouped_mlp(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, tokens_per_expert: Tensor, backend: str) -> Tensor:
    if backend in FUSED:
        bounds = F.pad(tokens_per_expert.cumsum(0, dtype=torch.int32), (1, 0))
        return _fused(x, None, (None, None, None), bounds, gate_up_proj, down_proj, backend)
    grouped = _grouped_mm_mlp if backend == "grouped_mm" else megablocks.grouped_glu
    return grouped(x, gate_up_proj, down_proj, tokens_per_expert)


def _fused(
    x: Tensor,
    weights: Tensor | None,
    places: tuple[Tensor | None, Tensor | None, Tensor | None],
    bounds: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    backend: str,
    sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`places`: of rows their tokens and weights, of slots their rows; none where x are the rows, and sorted."""
    from moe.kernels.fused import experts  # needs Triton, which other backends do without

    w1_sum, w2_sum = sums or (None, None)
    return experts(x.contiguous(), weights, *places, bounds, gate_up_proj, down_proj, w1_sum, w2_sum, backend)[0]


def _grouped_mm_mlp(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, tokens_per_expert: Tensor) -> Tensor:
    if _is_prepared_anew(x):
        rows, gate_up, down = x.float(), gate_up_proj.float(), down_proj.float()
        return _grouped_mm_mlp(rows, gate_up, down, tokens_per_expert).to(x.dtype)
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    gate_up_weight = gate_up_proj.flatten(1, 2).transpose(1, 2)  # (E, 2, I, H) -> (E, H, 2I): one GEMM for both
    gate_up = F.grouped_mm(x, gate_up_weight, offs=ends).unflatten(1, (2, -1))  # (N, H) -> (N, 2, I)
    return F.grouped_mm(swiglu(gate_up), down_proj.transpose(1, 2), offs=ends)


def _is_prepared_anew(x: Tensor) -> bool:
    """In half precision a CPU's library prepares a product anew for every number of rows, a millisecond or two each;
    compiled it would be no different, but torch traces this product in bfloat16 alone."""
    return x.device.type == "cpu" and x.dtype != torch.float32 and not torch.compiler.is_compiling()


def _fastest(device: torch.device, dtype: torch.dtype, widths: Iterable[int]) -> str:
    if dtype not in GROUPED_MM_DTYPES or any(width * dtype.itemsize % 16 for width in widths):
        return "loop"
    if device.type == "cpu":
        return "grouped_mm"
    # Elsewhere on CUDA torch's grouped_mm is a loop of its own, with a host synchronisation.
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (9, 0):
        return "loop"
    fused = [name for name in reversed(FUSED) if _is_installed(name)] if _is_hopper(device) else []
    return fused[0] if fused else "grouped_mm"


def _check_sums(sums: tuple[Tensor, Tensor] | None, weights: tuple[Tensor, Tensor], backend: str) -> None:
    if sums is None:
        return
    if backend not in FUSED:
        raise ValueError(f"expert backend {backend!r} adds to no sums: {' and '.join(FUSED)} do")
    for total, weight in zip(sums, weights, strict=True):
        if total.shape != weight.shape or total.dtype != torch.float32 or not total.is_contiguous():
            raise ValueError(
                f"sums must be contiguous float32 tensors of the weights' shapes: for {tuple(weight.shape)} not "
                f"{total.dtype} {tuple(total.shape)} with strides {total.stride()}"
            )


def _check_grouped(backend: str, dtype: torch.dtype, widths: Iterable[int]) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"expert backend {backend!r} is not one of {', '.join(available_backends())}")
    if not _is_installed(backend):
        raise ValueError(_missing(backend))
    if dtype not in GROUPED_MM_DTYPES:
        raise ValueError(f"expert backend {backend!r} runs bfloat16, float16 or float32, not {dtype}: use 'loop'")
    for width in widths:
        if width * dtype.itemsize % 16:
            multiple = 16 // dtype.itemsize
            raise ValueError(
                f"expert backend {backend!r} needs widths that are multiples of {multiple} in {dtype}, not {width}: "
                "change the width or use 'loop'"
            )
