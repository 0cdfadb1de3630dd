"""Check an experiment, then queue it under SLURM.

Takes the overrides of train.py, and how many nodes:

    python launch/submit.py +experiment=moe_16b parallel.expert=8 --nodes 4 --time 24:00:00 --partition gpu
    python launch/submit.py +experiment=moe_16b parallel.expert=8 --nodes 4 --dry-run      only prints the script
    python launch/submit.py train.steps=100 --gpus-per-node 0 --tasks-per-node 2           two processes on a CPU

A bad key, a layout that does not fit the processes, a batch that does not divide, a time limit too short to save in:
each ends here in one line (exit code 78) instead of after a night in the queue. What is queued is launch/train.sbatch
with its blanks filled in, and a copy of the code beside it, so that a job that comes back later runs what was
submitted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # this tree's code, whichever one is installed

from moe.config import Config, ConfigError, compose  # noqa: E402
from moe.config.errors import require  # noqa: E402
from moe.parallel.layout import Layout, resolve  # noqa: E402

TEMPLATE = REPOSITORY / "launch" / "train.sbatch"
CODE = ("train.py", "moe", "data", "conf", "launch")
EXIT_NOT_QUEUED = 1
EXIT_BAD_CONFIGURATION = 78


class NotQueued(RuntimeError):
    """The job could not be handed to SLURM; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        facts, script = prepare(options)
        if not options.dry_run:
            facts["job"] = queue(Path(facts["folder"]), script, options.snapshot)
            facts["log"] = facts["log"].replace("%j", facts["job"])
    except (ConfigError, NotQueued) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIGURATION if isinstance(error, ConfigError) else EXIT_NOT_QUEUED
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    for warning in facts["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(_summary(facts), file=sys.stderr if options.dry_run else sys.stdout)
    print(script if options.dry_run else f"job {facts['job']}, log {facts['log']}")
    return 0


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The facts of a job and the script to queue. Raises ConfigError."""
    for key in ("nodes", "tasks_per_node", "cpus_per_task", "grace"):
        value = getattr(options, key)
        require(value is None or value >= 1, f"--{key.replace('_', '-')}", "at least 1", value)
    require(options.gpus_per_node >= 0, "--gpus-per-node", "at least 0", options.gpus_per_node)
    if options.time is not None:
        limit = seconds_of(options.time)
        require(limit is not None, "--time", "minutes, H:M:S, D-H:M:S or another of the queue's formats", options.time)
        below = f"below the {limit:,.0f} seconds of --time={options.time}"
        require(limit > options.grace, "--grace", below, options.grace)
    config = compose(options.overrides)
    tasks = options.tasks_per_node or options.gpus_per_node or 1
    layout = resolve(config, options.nodes * tasks)
    folder = Path(config.output_dir, "jobs", f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").absolute()
    facts = describe(config, layout, options.nodes, tasks) | {
        "micro_batches_per_step": config.train.global_batch_size // (config.train.micro_batch_size * layout.data),
        "warnings": straddling(layout, options.nodes, tasks),
        "folder": str(folder),
        "log": str(folder / "slurm-%j.log"),
        "job": None,
    }
    return facts, fill(TEMPLATE.read_text(encoding="utf-8"), config.name, tasks, facts["log"], folder, options)


def seconds_of(limit: str) -> float | None:
    """Of minutes[:seconds], H:M:S, D-H[:M[:S]] or UNLIMITED, as 0 is; None: SLURM would not understand it."""
    if limit.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return math.inf
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    numbers = [days, *parts] if dash else parts
    if len(parts) > 3 or not all(number.isascii() and number.isdecimal() for number in numbers):
        return None
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    seconds = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return seconds + 86_400 * int(days or 0) or math.inf


def describe(config: Config, layout: Layout, nodes: int, tasks_per_node: int) -> dict[str, Any]:
    """What will run: ranks, layout, parameters, tokens."""
    model, train = config.model.build(), config.train
    tokens_per_step = train.global_batch_size * config.data.seq_len
    return {
        "name": config.name,
        "nodes": nodes,
        "tasks_per_node": tasks_per_node,
        "layout": asdict(layout),
        "num_params": model.num_params(),
        "num_active_params": model.num_active_params(),
        "steps": train.steps,
        "tokens_per_step": tokens_per_step,
    }


def straddling(layout: Layout, nodes: int, tasks_per_node: int) -> list[str]:
    """Warnings for groups that talk in every layer and whose ranks do not all sit in one node."""
    traffic = {"tensor": "the activations of every layer", "expert": "the tokens of every MoE layer"}
    return [
        f"parallel.{axis}={getattr(layout, axis)} does not divide the {tasks_per_node} ranks of a node: "
        f"{what} cross the network between nodes"
        for axis, what in traffic.items()
        if nodes > 1 and tasks_per_node % getattr(layout, axis)
    ]


def fill(template: str, name: str, tasks: int, log: str, folder: Path, options: argparse.Namespace) -> str:
    """`template` with the #SBATCH lines of this job, followed by what it runs: environment and arguments."""
    directives = [
        f"--job-name={name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={options.cpus_per_task}",
        f"--output={log}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{options.grace}",
        *([f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []),
        *(f"--{key}={value}" for key in ("time", "partition", "account", "qos") if (value := getattr(options, key))),
        *options.sbatch,
    ]
    variables = {
        "CODE": str(folder / "code" if options.snapshot else REPOSITORY),
        "PYTHON": options.python or ("python" if options.container else sys.executable),
        "CONTAINER": options.container or "",
        "MOUNTS": ",".join(options.mount),
    }
    filled = [f"#SBATCH {shlex.quote(directive)}" for directive in directives]
    filled += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    filled += [f"set -- {shlex.join(options.overrides)}"]
    head, _, rest = template.partition("#SBATCH")
    body = [line for line in rest.splitlines() if not line.startswith("#SBATCH")][1:]
    return head + "\n".join([*filled, *body])


def queue(folder: Path, script: str, snapshot: bool) -> str:
    """Write the job's folder and hand it to sbatch; the job's number. Raises NotQueued."""
    if not shutil.which("sbatch"):
        raise NotQueued("sbatch is not on the PATH: run this on a login node, or see the script with --dry-run")
    folder.mkdir(parents=True)
    try:
        return submit(folder, script, snapshot)
    except NotQueued:
        shutil.rmtree(folder)
        raise


def submit(folder: Path, script: str, snapshot: bool) -> str:
    """Fill the new folder and call sbatch; the job's number. Raises NotQueued."""
    if snapshot:
        copy_code(folder / "code")
    path = folder / "job.sbatch"
    path.write_text(script + "\n", encoding="utf-8")
    result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise NotQueued(" ".join(result.stderr.split()) or f"sbatch ended with code {result.returncode}")
    return result.stdout.strip().partition(";")[0]  # "123;cluster" where there are several clusters


def copy_code(target: Path) -> None:
    """Copy the code as it is now, changes included: what git tracks or would track. Raises NotQueued without git."""
    command = [
        "git",
        "-C",
        str(REPOSITORY),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *CODE,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NotQueued(f"{REPOSITORY} is no git repository, so there is no telling what is code: use --no-snapshot")
    for name in filter(None, result.stdout.split("\0")):
        if (REPOSITORY / name).is_file():  # not deleted since the last commit
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)


def _summary(facts: dict[str, Any]) -> str:
    return (
        f"{facts['name']} on {facts['nodes']} x {facts['tasks_per_node']} ranks, {Layout(**facts['layout'])}: "
        f"{facts['num_params']:,} parameters, {facts['num_active_params']:,} active; {facts['steps']:,} steps of "
        f"{facts['tokens_per_step']:,} tokens in {facts['micro_batches_per_step']} micro-batches a rank"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launch/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py")
    add("--nodes", type=int, default=1)
    add("--gpus-per-node", type=int, default=8, help="0: no GPUs")
    add("--tasks-per-node", type=int, help="processes a node; default: as many as GPUs")
    add("--cpus-per-task", type=int, default=8)
    add("--time", help="limit of one stretch in the queue's format, such as 24:00:00; the job goes on after it")
    add("--grace", type=int, default=180, help="seconds before that limit at which the run saves and stops")
    add("--partition")
    add("--account")
    add("--qos")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="any other of sbatch's, as --sbatch=--mem=0")
    add("--container", metavar="IMAGE", help="run in this image, through pyxis or apptainer")
    add("--mount", action="append", default=[], metavar="FROM:TO", help="a further folder that the container sees")
    add("--python", metavar="PATH", help="interpreter; default: this one, or the container's python")
    add("--no-snapshot", dest="snapshot", action="store_false", help="run the repository as it is when the job starts")
    add("--dry-run", action="store_true", help="print the script, to be read: queue nothing, make no copy of the code")
    add("--json", action="store_true", help="print facts as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
