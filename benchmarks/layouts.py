r"""Train the same model under several parallel layouts and compare speed, memory and losses.

    python -m benchmarks.layouts --gpus 8 --layouts shard=8 shard=8,expert=8 tensor=2 replicate=2,shard=4 -- \
        +experiment=moe_2b data=prepared data.prepared=corpus train.global_batch_size=512

Needs nothing but torchrun, which starts `train.py` once a layout; one that ends with `@N` runs on N GPUs instead of
--gpus. What follows `--` goes to train.py. Speeds are the median log row after --warmup steps; efficiency is tokens a
second and GPU over those of the first layout; the loss column is the largest relative difference of any log row's loss
from the first layout's. Memory is the most that the first rank's allocator handed out. With --gpu what `moe.plan` says
of that GPU stands beside speed and memory.

A router that has just begun loads some experts several times as much as others, and ranks that share experts out wait
for the fullest. With --trained N the first layout trains N steps before those that count, and the others go on from its
checkpoint; steps of one micro-batch are enough: train.batch_ramp='[[N,64]]'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import check_layout, new_file, overrides_of, positive
from moe.config import compose
from moe.hardware import GPUS
from moe.plan import plan

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    options = parse_arguments()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in options.layouts:
            results.append(measure(layout, options, Path(options.output or folder) / "layouts"))
            print_table(results)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
            if options.trained and results[0]["exit_code"]:
                break  # there is nothing to go on from
    if any(result["exit_code"] for result in results):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=positive, default=2, help="processes of each run (default: 2)")
    parser.add_argument("--layouts", nargs="+", type=layout_name, required=True, metavar="AXIS=N[,AXIS=N][@GPUS]")
    parser.add_argument("--steps", type=positive, default=40, help="of each run (default: 40)")
    parser.add_argument("--warmup", type=int, default=10, help="steps at the start that are not timed (default: 10)")
    parser.add_argument("--trained", type=int, default=0, metavar="N", help="steps before all others (default: 0)")
    parser.add_argument("--log-interval", type=positive, default=5, help="steps of a log row (default: 5)")
    parser.add_argument("--gpu", choices=GPUS, help="plan for this kind as well")
    parser.add_argument("--output", help="keep the run folders here")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the results there")
    parser.add_argument("overrides", nargs="*", help="for train.py, after --")
    options = parser.parse_args()
    if not 0 <= options.warmup < options.steps:
        parser.error(f"--warmup must be below --steps={options.steps}, not {options.warmup}")
    if options.trained and options.trained < options.steps:  # there is one checkpoint, after --trained steps
        parser.error(f"--trained must be 0 or at least --steps={options.steps}, not {options.trained}")
    for layout in options.layouts:
        check_layout(parser, *read_layout(layout, options.gpus), options.overrides)
    return options


def layout_name(text: str) -> str:
    """AXIS=N[,AXIS=N][@GPUS]."""
    _, at, processes = text.partition("@")
    if at and not processes.lstrip("0").isdecimal():
        raise argparse.ArgumentTypeError(f"after @ comes a number of GPUs, not {processes!r}")
    return text


def read_layout(layout: str, gpus: int) -> tuple[list[str], int]:
    """Overrides and processes."""
    axes, _, processes = layout.partition("@")
    return overrides_of(axes), int(processes or gpus)


def measure(layout: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of train.py."""
    overrides, processes = read_layout(layout, options.gpus)
    run, first_run = (folder / text.replace("=", "").replace(",", "-") for text in (layout, options.layouts[0]))
    total = options.trained + options.steps
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py"),
        *options.overrides,
        *overrides,
        f"train.steps={total}",
        f"train.log_interval={options.log_interval}",
        "train.eval_interval=0",
        "train.eval_at_end=false",
        f"checkpoint.interval={options.trained}",
        "checkpoint.at_end=false",
        f"optim.schedule.warmup_steps={total // 4}",
        "telemetry.report=false",
        f"output_dir={folder.parent}",
        f"name={folder.name}",
        f"run={run.name}",
    ]
    if options.trained and run != first_run and not run.exists():
        shutil.copytree(first_run / "checkpoints", run / "checkpoints", copy_function=os.link)
    print(f"{layout}: {total} steps", file=sys.stderr, flush=True)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        return {"layout": layout, "gpus": processes, "exit_code": done.returncode, "seconds": seconds}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "validation" not in row and row["step"] > options.trained]
    timed = [row for row in rows if row["step"] > options.trained + options.warmup]
    speed = statistics.median(row["tokens_per_second"] for row in timed) / processes
    return {
        "layout": layout,
        "gpus": processes,
        "exit_code": 0,
        "seconds": seconds,
        "tokens_per_second_per_gpu": speed,
        "mfu": statistics.median(row["mfu"] for row in timed) if timed[0]["mfu"] is not None else None,
        "peak_memory_gib": max(row["memory_gib"] or 0.0 for row in rows),
        "losses": {row["step"]: row["loss"] for row in rows},
        "planned": planned([*options.overrides, *overrides], processes, options.gpu) if options.gpu else None,
    }


def planned(overrides: list[str], processes: int, gpu: str) -> dict[str, float]:
    """Of this layout and batch, nothing left to choose."""
    config = compose(overrides)
    chosen = [
        f"train.micro_batch_size={config.train.micro_batch_size}",
        f"runtime.activation_checkpointing={config.runtime.activation_checkpointing}",
        f"parallel.reshard={str(config.parallel.reshard).lower()}",
    ]
    best = plan([*overrides, *chosen, f"gpus={processes}", f"gpu={gpu}"])["best"]
    return {
        "tokens_per_second_per_gpu": best["tokens_per_second_per_gpu"],
        "peak_memory_gib": best["peak_bytes"] / 2**30,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    columns = (
        f"{'layout':28} {'GPUs':>4} {'tokens/s/GPU':>12} {'MFU':>6} {'efficiency':>10} {'peak GiB':>8} {'loss':>8}"
    )
    print(f"{columns}  planned")
    first = results[0]
    for result in results:
        name = f"{result['layout'].partition('@')[0]:28} {result['gpus']:4}"
        if result["exit_code"]:
            print(f"{name}  failed with exit code {result['exit_code']}")
            continue
        efficiency = difference = float("nan")
        if not first["exit_code"]:
            efficiency = result["tokens_per_second_per_gpu"] / first["tokens_per_second_per_gpu"]
            pairs = zip(result["losses"].values(), first["losses"].values(), strict=True)
            difference = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        mfu = " " * 6 if result["mfu"] is None else f"{result['mfu']:6.1%}"
        print(
            f"{name} {result['tokens_per_second_per_gpu']:12,.0f} {mfu} {efficiency:10.1%} "
            f"{result['peak_memory_gib']:8.2f} {difference:8.1e}  {foretold(result)}"
        )
    print(flush=True)


def foretold(result: dict[str, Any]) -> str:
    """Planned figures, and by how much they exceed the measured ones."""
    if not result["planned"]:
        return ""
    speed, memory = (result["planned"][key] for key in ("tokens_per_second_per_gpu", "peak_memory_gib"))
    excess = speed / result["tokens_per_second_per_gpu"] - 1, memory / (result["peak_memory_gib"] or math.nan) - 1
    return f"{speed:,.0f} ({excess[0]:+.0%}), {memory:.1f} GiB ({excess[1]:+.0%})"


if __name__ == "__main__":
    main()
