"""Training: the step, the loop around it, and the run as `train.py` starts it."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import torch

from data.errors import DataError, complaint
from moe.checkpoint import CheckpointError
from moe.config import Config, ConfigError
from moe.config.schema import RuntimeConfig
from moe.parallel import EXIT_PEER_FAILED, PeerFailure, choose_device, join_world, resolve
from moe.telemetry import MetricsError
from moe.training.guard import NumericalAbort
from moe.training.run_lock import RunFolderBusy
from moe.training.session import Session
from moe.training.signals import StopSignal

EXIT_CODES: dict[type[Exception], int] = {
    NumericalAbort: 76,
    DataError: 77,
    CheckpointError: 77,
    MetricsError: 77,
    RunFolderBusy: 77,
    OSError: 77,
    ConfigError: 78,
    PeerFailure: EXIT_PEER_FAILED,
}
EXIT_PREEMPTED = 75

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h, bytes: what may lie unused at the heap's end, and from what size on a piece is mapped alone."""

__all__ = ["EXIT_CODES", "EXIT_PREEMPTED", "is_out_of_memory", "prepare_process", "run"]


def run(config: Config, command: Sequence[str]) -> None:
    """Train as `config` says; `command` is what was typed. Ends the process with an exit code of `train.py` unless all
    went well."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        finished = _run(config, command)
    except tuple(EXIT_CODES) as error:
        _fail(error)
    except RuntimeError as error:
        if is_out_of_memory(error):
            print(
                "error: out of memory: a smaller train.micro_batch_size or model needs less, and `python -m moe.plan` "
                f"says how much ({complaint(error)})",
                file=sys.stderr,
            )
            sys.exit(1)
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            error.add_note(_advice_on_compilation())
        raise
    if not finished:
        print("stopped by a signal and saved; run the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)


def _run(config: Config, command: Sequence[str]) -> bool:
    prepare_process(config.runtime)
    stop = StopSignal(choose_device(config.runtime.device), int(os.environ.get("WORLD_SIZE", "1")))
    with (
        stop.listening(),
        join_world(config.runtime.device, partial(resolve, config), config.parallel.timeout) as world,
    ):
        return Session(config, world, stop, command).execute()


def prepare_process(runtime: RuntimeConfig) -> None:
    """Settings that hold for the whole process, before CUDA starts."""
    if runtime.num_threads:
        torch.set_num_threads(runtime.num_threads)
    if runtime.deterministic:
        require_repeatable_kernels()
    if choose_device(runtime.device).type == "cpu":
        keep_freed_memory()


def require_repeatable_kernels() -> None:
    """Have torch choose kernels that return the same bits in every process, and raise where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch._inductor.config.deterministic = True  # else it times candidates and may keep another reduction order


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one: large pieces go back to the kernel otherwise, and return as
    fresh pages, a fault each, a tenth of a step on a CPU (docs/performance.md). Other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that every glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def is_out_of_memory(error: RuntimeError) -> bool:
    """On any device; a CPU's has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _advice_on_compilation() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second

    return (
        "error: torch.compile failed; runtime.compile=false does without. An earlier compilation that was interrupted "
        f"can have left half a file in {cache_dir()}: delete that folder"
    )


def _fail(error: BaseException) -> NoReturn:
    code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    print(f"error: {complaint(error)}", file=sys.stderr)
    sys.exit(code)
