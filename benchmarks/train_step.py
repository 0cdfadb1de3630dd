"""Time whole optimizer steps of a configuration and show where the time goes: python -m benchmarks.train_step.

    python -m benchmarks.train_step --profile -- +experiment=moe_2b train.global_batch_size=32 train.micro_batch_size=32
    python -m benchmarks.train_step --compare runtime.expert_backend=triton,grouped_mm -- +experiment=moe_2b ...
    python -m benchmarks.train_step --peers transformers -- runtime.device=cpu
    torchrun --nproc_per_node=2 -m benchmarks.train_step --profile -- +experiment=moe_2b parallel.expert=2 ...

Builds the run as `train.py` does, data included, and takes its steps in this process without rows, evaluation and
checkpoints; peers are fed the same batches. Rounds take turns, so that a machine that slows down slows all. Prints
tokens a second and GPU and MFU of the median step, the allocator's peak on a GPU, and with --profile the GPU's time by
kind of work, the longest kernels, for how long it did nothing but communicate, and nothing at all; on a CPU the time of
operators. Of several ranks the first prints.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count, pairwise
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.arguments import new_file, positive
from benchmarks.peer_models import MODELS, PlainStep
from data.errors import DataError, complaint
from moe.config import ConfigError, compose
from moe.config.schema import RuntimeConfig
from moe.parallel import choose_device, join_world, resolve
from moe.telemetry.hardware import peak_tflops
from moe.training import EXIT_CODES, is_out_of_memory, prepare_process
from moe.training.session import Session
from moe.training.signals import StopSignal
from moe.training.trainer import forbid_sync

WORK = {
    "communication": ("nccl",),
    "expert products": ("quackgemm", "groupproblem", "_up_projection"),
    "expert rows": ("_sum_rows", "_spread_rows", "_swiglu_backward", "_list_tiles", "indexselect", "vectorized_gather"),
    "attention": ("fmha", "flash", "sdpa", "cudnn", "attention"),
    "routing": ("sort", "topk", "scatter"),
    "optimizer": ("adam", "multi_tensor_apply", "lpnorm"),
    "weight casts, gradient sums": ("chunk_cat", "copy_kernel", "functor_add<float>", "memcpy dtod", "binary_internal"),
    "dense products": ("nvjet", "gemm", "cutlass", "cublas", "splitk", "aten::mm", "aten::addmm"),
    "compiled elementwise": ("triton_",),
    "copies between host and device": ("memcpy htod", "memcpy dtoh"),
}
"""Kinds of work by parts of kernel names; the first that fits."""


class Kernel(NamedTuple):
    """On a CPU an operator, without those that it calls."""

    name: str
    milliseconds: float
    launches: float


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel does."""
    name = kernel.lower()
    return next((kind for kind, parts in WORK.items() if any(part in name for part in parts)), "other")


class Contestant:
    """Something that trains, with the times of its steps; `problem` says why it does not."""

    def __init__(self, name: str, overrides: list[str], peer: str | None) -> None:
        self.name, self.overrides, self.peer = name, overrides, peer
        self.times: list[float] = []
        self.kernels: list[Kernel] = []
        self.gaps: dict[str, float] = {}
        """Milliseconds a step in which a GPU only communicated, or did nothing."""
        self.world_size = 1
        self.peak_gib = 0.0
        self.problem = ""

    def measure(self, steps: int, warmup: int, profiled: bool) -> None:
        """Train `warmup` steps, then time `steps`."""
        if self.problem:
            return
        with tempfile.TemporaryDirectory() as folder:
            self.config = compose([*self.overrides, f"output_dir={folder}"])
            try:
                self._measure(steps, warmup, profiled)
            except (torch.OutOfMemoryError, ImportError) as error:
                self.problem = str(error).splitlines()[0][:160]
            except Exception as error:
                if self.peer is None:
                    raise
                self.problem = f"{type(error).__name__}: {error}".splitlines()[0][:160]  # peers fail in any way
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _measure(self, steps: int, warmup: int, profiled: bool) -> None:
        config = self.config
        if self.peer is None:
            prepare_process(config.runtime)
        stop = StopSignal(torch.device("cpu"), 1)
        with join_world(config.runtime.device, partial(resolve, config), config.parallel.timeout) as world:
            session = Session(config, world, stop, ["benchmarks.train_step"])
            self.model = session.model.config
            try:
                step = self._stepper(session)
                for _ in range(warmup):
                    step()
                with forbid_sync(world.device, active=config.runtime.detect_sync and self.peer is None):
                    self.times += _times(step, steps, world.device)
                if world.device.type == "cuda":
                    self.peak_gib = torch.cuda.max_memory_allocated() / 2**30
                if profiled:
                    self.kernels, self.gaps = _profile(step, world.device)
            finally:
                session.loader.close()
            self.world_size = world.size
            self.peak_tflops = config.telemetry.peak_tflops or peak_tflops(world.device, config.train.compute_dtype)

    def _stepper(self, session: Session) -> Callable[[], None]:
        numbers, device = count(), session.world.device
        if self.peer is None:
            return lambda: session.trainer.step(next(numbers), next(session.loader))
        del session.model, session.trainer, session.rows
        gc.collect()
        torch.manual_seed(0)
        with device:
            model = MODELS[self.peer](self.model)
        step = PlainStep(model, self.config, device, self.config.runtime.compile)
        return lambda: step(next(session.loader))

    def row(self) -> dict[str, Any]:
        if self.problem:
            return {"name": self.name, "problem": self.problem}
        milliseconds = statistics.median(self.times)
        tokens = self.config.train.global_batch_size * self.config.data.seq_len / self.world_size
        rate = tokens / milliseconds * 1e3
        tflops = rate * self.model.flops_per_token(self.config.data.seq_len) / 1e12
        return {
            "name": self.name,
            "tokens_per_second": rate,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "milliseconds": milliseconds,
            "fastest": min(self.times),
            "peak_gib": self.peak_gib,
            "gaps": self.gaps,
            "kernels": [kernel._asdict() for kernel in self.kernels],
        }


def measured(contestant: Contestant, *arguments: Any) -> Contestant:
    """The contestant after `Contestant.measure`."""
    contestant.measure(*arguments)
    return contestant


def measured_apart(contestant: Contestant, *arguments: Any) -> Contestant:
    """The same in a process of its own, so that no setting of one contestant's is another's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measured, contestant, *arguments).result()


def _times(step: Callable[[], None], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each step; those of a GPU on its own clock, while the host keeps it supplied."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step()
            marks.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in pairwise(marks)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    ends[0].record()
    for end in ends[1:]:
        step()
        end.record()
    while not ends[-1].query():  # waiting for it is not allowed where a step may not wait either
        time.sleep(0.001)
    return [start.elapsed_time(end) for start, end in pairwise(ends)]


def _profile(step: Callable[[], None], device: torch.device, steps: int = 2) -> tuple[list[Kernel], dict[str, float]]:
    """Kernels of a step, the longest first, and `Contestant.gaps`."""
    is_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    clock = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if is_gpu:
            torch.cuda.synchronize()
    found = [
        Kernel(event.key, getattr(event, clock) / 1e3 / steps, event.count / steps)
        for event in profiler.key_averages()
        if getattr(event, clock) > 0
    ]
    found.sort(key=lambda kernel: -kernel.milliseconds)
    runs = [(event.name, (event.time_range.start, event.time_range.end)) for event in profiler.events()]
    if not is_gpu or not runs:
        return found, {}
    every = [run for _, run in runs]
    working = covered([run for name, run in runs if kind_of(name) != "communication"])
    busy, whole = covered(every), max(end for _, end in every) - min(start for start, _ in every)
    gaps = {"nothing but communication between GPUs": busy - working, "nothing at all": whole - busy}
    return found, {name: microseconds / 1e3 / steps for name, microseconds in gaps.items()}


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def print_row(row: dict[str, Any]) -> None:
    if "problem" in row:
        print(f"{row['name']:44} {row['problem']}", flush=True)
        return
    mfu = f"{row['mfu']:7.1%}" if row["mfu"] is not None else " " * 7
    print(
        f"{row['name']:44} {row['tokens_per_second']:10,.0f} {mfu} {row['milliseconds']:9.1f} {row['fastest']:9.1f} "
        + (f"{row['peak_gib']:8.1f}" if row["peak_gib"] else ""),
        flush=True,
    )
    if row["kernels"]:
        _print_profile([Kernel(**kernel) for kernel in row["kernels"]], row["milliseconds"])
        for gap, milliseconds in row["gaps"].items():
            print(f"    {milliseconds:9.2f} ms {gap}")


def _print_profile(kernels: list[Kernel], step: float, longest: int = 40) -> None:
    kinds: dict[str, list[float]] = {}
    for kernel in kernels:
        total = kinds.setdefault(kind_of(kernel.name), [0.0, 0.0])
        total[0] += kernel.milliseconds
        total[1] += kernel.launches
    for kind, (milliseconds, launches) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        print(f"    {milliseconds:9.2f} ms {milliseconds / step:6.1%} {launches:7.0f} x  {kind}")
    print(f"    {sum(k.milliseconds for k in kernels):9.2f} ms in all, of {step:.2f} ms")
    for kernel in kernels[:longest]:
        print(f"      {kernel.milliseconds:8.2f} ms {kernel.launches:6.0f} x  {kernel.name[:110]}")


def contestants(options: argparse.Namespace) -> list[Contestant]:
    key, has_values, values = (options.compare or "").partition("=")
    if options.compare and not has_values:
        raise ConfigError(f"--compare {options.compare}: KEY=A,B names the values to compare")
    variants = [f"{key}={value}" for value in values.split(",")] if options.compare else [""]
    ours = [Contestant(f"ours {variant}".strip(), [*options.overrides, *variant.split()], None) for variant in variants]
    return [*ours, *(Contestant(peer, options.overrides, peer) for peer in options.peers)]


def sets_its_process(options: argparse.Namespace) -> bool:
    """Whether contestants differ in what holds for a process, `moe.training.prepare_process`."""
    return bool(options.peers and not torch.cuda.is_available()) or "deterministic" in (options.compare or "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=20, help="that are timed in each round (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: 5)")
    parser.add_argument("--rounds", type=positive, default=1, help="turns of every contestant (default: 1)")
    parser.add_argument("--compare", metavar="KEY=A,B", help="one row for each value of a key")
    parser.add_argument("--peers", nargs="+", choices=MODELS, default=[])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=new_file, metavar="FILE")
    parser.add_argument("overrides", nargs="*", help="of the configuration, after --")
    options = parser.parse_args()
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        all_of_them = contestants(options)
        for contestant in all_of_them:
            resolve(compose(contestant.overrides), int(os.environ.get("WORLD_SIZE", "1")))
        print(
            f"{_device(compose(options.overrides).runtime)}, torch {torch.__version__}\n{' '.join(options.overrides)}"
        )
        print(f"{'':44} {'tokens/s':>10} {'MFU':>7} {'ms':>9} {'fastest':>9} {'peak GiB':>8}", flush=True)
        measure = measured_apart if sets_its_process(options) else measured
        for number in range(options.rounds):
            arguments = options.steps, options.warmup, options.profile and number == 0
            all_of_them = [measure(contestant, *arguments) for contestant in all_of_them]
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODES[type(error)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory, {complaint(error)}", file=sys.stderr)
        return 1
    rows = [contestant.row() for contestant in all_of_them]
    for row in rows:
        print_row(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("problem" in row for row in rows))


def _device(runtime: RuntimeConfig) -> str:
    if choose_device(runtime.device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"{runtime.num_threads or torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    raise SystemExit(main())
