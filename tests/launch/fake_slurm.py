"""A SLURM of shell scripts: enough of srun, scontrol and sbatch to run launch/train.sbatch on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# starts one process where SLURM would start all, and counts what it is told
SRUN = """#!/usr/bin/env bash
[ "$1" != --help ] || { echo "$SRUN_HELP"; exit; }
printf '%s\\n' "$@" > srun.arguments
env > srun.environment
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $* in
  "show hostnames "*) printf '%s\\n' $HOSTS ;;
  "--oneliner show job "*) echo "JobId=$4 JobName=x JobState=$JOB_STATE Reason=None" ;;
  "requeue "*) echo "$2" >> requeued ;;
  *) exit 1 ;;
esac
"""
SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$@" > sbatch.arguments
[ -z "$SBATCH_COMPLAINT" ] || { echo "$SBATCH_COMPLAINT" >&2; exit 3; }
echo "4711;cluster"
"""
# stands for the real one: says where it writes, and then ends as it is told or waits for signals
TRAIN = """
import os, signal, sys, time
signals = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(signal.Signals(number).name))
print("0: moe_tiny: 3 parameters; run folder", os.environ["RUN_FOLDER"], flush=True)
open("ready", "w").close()
while os.environ["UNTIL_SIGNAL"] and not signals:
    time.sleep(0.02)
time.sleep(0.3 if signals else 0)  # for the second signal of a pair to come
open("signals", "w").write(" ".join(signals))
open("arguments", "w").write(" ".join(sys.argv[1:]))
sys.exit(int(os.environ["EXIT_CODE"]))
"""


class FakeSlurm:
    """One job's folder, with the commands on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "moesaic-7.log"
        self.run = folder / "outputs" / "run one"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
            self.write(f"bin/{name}", text).chmod(0o755)
        self.write("train.py", TRAIN)
        self.write("launch/environment.sh", (REPOSITORY / "launch" / "environment.sh").read_text())

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "3",
            "HOSTS": "node1 node2",
            "JOB_STATE": "RUNNING",
            "RUN_FOLDER": str(self.run),
            "UNTIL_SIGNAL": "",
            "EXIT_CODE": "0",
            **variables,
        }

    def start(self, *overrides: str, **variables: str) -> subprocess.Popen[str]:
        """Run train.sbatch as SLURM does, its output appended to the log."""
        command = ["bash", str(REPOSITORY / "launch" / "train.sbatch"), *overrides]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment(**variables), stdout=log, stderr=log, text=True
            )

    def finish(self, *overrides: str, **variables: str) -> int:
        return self.start(*overrides, **variables).wait(60)

    def interrupt(self, *numbers: signal.Signals, **variables: str) -> int:
        """Start, send the batch script these signals once training listens, and return its exit code."""
        (self.folder / "ready").unlink(missing_ok=True)
        process = self.start(UNTIL_SIGNAL="yes", **variables)
        while not (self.folder / "ready").exists():
            assert process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        for number in numbers:
            os.kill(process.pid, number)
            time.sleep(0.1)
        return process.wait(60)

    def save_checkpoint(self, step: int) -> None:
        (self.run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)

    @property
    def requeued(self) -> list[str]:
        return self.read("requeued").split()
