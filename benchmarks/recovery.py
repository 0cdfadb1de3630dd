r"""One run that saves, changes its layout on the way and loses a rank: python -m benchmarks.recovery.

    python -m benchmarks.recovery --gpus 2 --layouts shard=2 shard=2,expert=2 tensor=2 -- \
        +experiment=moe_2b train.global_batch_size=64 train.micro_batch_size=16

Starts the ranks of `train.py` itself, as SLURM would, once a layout: each start goes on from the checkpoint of the one
before, trains --steps steps with a checkpoint after every --interval, and ends by SIGTERM. Then the last layout starts
once more, its last rank is killed, and what the others do is timed; a last start trains to the end. After it comes a
run in the first layout that nothing disturbs. Prints for every start the seconds to its first row (start, load,
compile), a step, how much longer the step behind a checkpoint took, and from the signal, or the first row, to the end;
at last the largest relative difference of any step's loss from the undisturbed run's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import check_layout, overrides_of, positive

ROOT = Path(__file__).resolve().parents[1]
STOPPED, PEER_FAILED = 75, 79
"""Exit codes of train.py after a signal, and where another rank died."""
UNSAVED = ("checkpoint.interval=0", "checkpoint.at_end=false")


class Start:
    """The ranks of one run in one layout."""

    def __init__(self, run: Path, layout: str, gpus: int, arguments: list[str]) -> None:
        self.run, self.layout = run, layout
        self.began, self.first_step = time.perf_counter(), len(self.rows())
        run.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "train.py", *arguments, *overrides_of(layout), f"output_dir={run.parents[1]}"]
        command += [f"name={run.parent.name}", f"run={run.name}"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(gpus):
            names = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": gpus,
                "LOCAL_WORLD_SIZE": gpus,
                "MASTER_PORT": port,
            }
            environment = os.environ | {name: str(value) for name, value in names.items()}
            with (run / f"{rank}.err").open("wb") as errors:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment | {"MASTER_ADDR": "127.0.0.1"},
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                    )
                )

    def rows(self) -> list[dict[str, Any]]:
        """One for every step so far, of all starts."""
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if "validation" not in row]

    def wait_for_first(self) -> float:
        """Until this start has a row of its own; the seconds since it began."""
        while len(self.rows()) <= self.first_step:
            self.first_step = min(self.first_step, len(self.rows()))  # rows past the checkpoint are dropped
            self._pause()
        return time.perf_counter() - self.began

    def wait_for(self, step: int) -> None:
        """Until that step has its row."""
        while len(self.rows()) < step:
            self._pause()

    def _pause(self) -> None:
        if any(process.poll() is not None for process in self.processes):
            self.kill()
            raise SystemExit(f"{self.layout}: ended early\n{self.errors()[-2000:]}")
        time.sleep(0.02)

    def end(self, which: slice, sign: signal.Signals) -> tuple[float, list[int]]:
        """Signal some of the ranks, or none; the seconds until all have ended, and their exit codes."""
        begun = time.perf_counter()
        for process in self.processes[which]:
            process.send_signal(sign)
        codes = [process.wait() for process in self.processes]
        return time.perf_counter() - begun, codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def errors(self) -> str:
        """What the first rank had to say."""
        return (self.run / "0.err").read_text(errors="replace")

    def pace(self, interval: int) -> tuple[float, float]:
        """Seconds of the median step, and by how much that behind the first checkpoint exceeds it: one behind a later
        checkpoint may wait for the files of the earlier one, which comes within seconds here."""
        rows = self.rows()[self.first_step :]  # the first waits for compilation
        took = {
            after["step"]: after["elapsed_seconds"] - before["elapsed_seconds"]
            for before, after in zip(rows, rows[1:], strict=False)
        }
        usual = statistics.median(took.values())
        behind = next((seconds for step, seconds in took.items() if (step - 1) % interval == 0), usual)
        return usual, behind - usual


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=positive, default=2, help="processes of each start (default: 2)")
    parser.add_argument("--layouts", nargs="+", required=True, metavar="AXIS=N[,AXIS=N]")
    parser.add_argument("--steps", type=positive, default=12, help="of each start (default: 12)")
    parser.add_argument("--interval", type=positive, default=5, help="steps between checkpoints (default: 5)")
    parser.add_argument("overrides", nargs="*", help="for train.py, after --")
    options = parser.parse_args()
    if options.steps < options.interval + 2:
        parser.error(f"--steps must be at least --interval={options.interval} plus 2, not {options.steps}")
    for layout in options.layouts:
        check_layout(parser, overrides_of(layout), options.gpus, options.overrides)
    total = options.steps * (len(options.layouts) + 2)
    arguments = [
        *options.overrides,
        f"train.steps={total}",
        "train.log_interval=1",
        "train.eval_interval=0",
        "train.eval_at_end=false",
        f"checkpoint.interval={options.interval}",
        f"optim.schedule.warmup_steps={total // 4}",
        "telemetry.report=false",
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "recovery"
        disturbed = disturb(runs / "disturbed", arguments, options)
        calm = Start(runs / "calm", options.layouts[0], options.gpus, [*arguments, *UNSAVED])
        calm.end(slice(0), signal.SIGTERM)
        pairs = zip(disturbed, calm.rows(), strict=True)
        print(f"largest difference of a loss: {max(abs(a['loss'] / b['loss'] - 1) for a, b in pairs):.1e}")
    return 0


def disturb(run: Path, arguments: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All starts; the rows that they leave."""
    print(f"{'layout':28} {'first row, s':>12} {'step, s':>8} {'save, s':>8} {'to the end, s':>13}  exit codes")
    for number, layout in enumerate(options.layouts):
        start = Start(run, layout, options.gpus, arguments)
        ready = start.wait_for_first()
        start.wait_for(options.steps * (number + 1))
        took, codes = start.end(slice(None), signal.SIGTERM)
        show(start, ready, options.interval, took, codes)
        if set(codes) != {STOPPED}:
            raise SystemExit(start.errors()[-2000:])
    lost = Start(run, layout, options.gpus, arguments)
    ready = lost.wait_for_first()
    lost.wait_for(lost.first_step + options.interval + 2)
    took, codes = lost.end(slice(-1, None), signal.SIGKILL)
    show(lost, ready, options.interval, took, codes)
    print(f"    rank {options.gpus - 1} killed; the first rank: {last_error(lost.errors())}")
    if set(codes[:-1]) != {PEER_FAILED}:
        raise SystemExit(lost.errors()[-2000:])
    again = Start(run, layout, options.gpus, arguments)
    ready = again.wait_for_first()
    took, codes = again.end(slice(0), signal.SIGTERM)
    show(again, ready, options.interval, took, codes)
    return again.rows()


def show(start: Start, ready: float, interval: int, took: float, codes: list[int]) -> None:
    step, stall = start.pace(interval)
    print(f"{start.layout:28} {ready:12.1f} {step:8.3f} {stall:8.3f} {took:13.1f}  {codes}", flush=True)


def last_error(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.startswith("error:")), "nothing")


if __name__ == "__main__":
    raise SystemExit(main())
