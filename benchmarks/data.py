"""Our data path beside its peers: `python -m benchmarks.data --work DIR [--only ours,litdata] [--json FILE]`.

The peers are Hugging Face datasets (streaming), torchdata, litdata and mosaicml-streaming. Each is installed by pip
into an environment of its own below DIR, gets the same corpus in its own format, and is read by processes that hold
nothing else. pip finds a torch for the CPU alone with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

All are read from the page cache. A batch is inputs and labels as int64 tensors, and the inputs are counted. Our batches
also say where documents start, what is padding and which language it is; those of the peers are ids alone, inputs and
labels views of one tensor. Ways to read are measured in rounds, in another order every time; the table has medians, and
the least and the most. `start` is the time from the end of the imports to the first batch, `resume` the same from a
state in the middle of an epoch, `exact` whether the batch that followed was the one an undisturbed reader gets.

Text is counted in tokens that come out; `of raw` compares with the `tokenizers` library alone, at its fastest in the
same round. Nothing is asserted: what a run shows depends on the machine and on what else runs there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.data_peers.common import Job
from benchmarks.data_peers.corpus import write_text, write_tokens
from benchmarks.data_peers.report import Row, table
from benchmarks.data_peers.systems import ROOT, SYSTEMS, Case, Failure, install, run, warm

SAMPLE = [ROOT / "data" / "sample" / name for name in ("en.jsonl", "zh.jsonl")]
QUICK = {"tokens": 2_000_000, "text_bytes": 8_000_000, "rounds": 1, "seconds": 0.5, "seq_len": [2048]}
POSITIONS = (1_000, 1_000_000, 1_000_000_000)


@dataclass
class Reading:
    """A way to read with its job, its state and the row of the table; `expected` is the batch behind the state."""

    system: str
    case: Case
    job: Job
    row: Row
    expected: object = None


class Comparison:
    """All that is measured, in order: written corpora, states, then rounds.

    Attributes:
        readings: what is measured.
        written: seconds it took to write the corpus in each format, by system and sequence length.
        versions: of the packages, by system.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._work = arguments.work.resolve()
        self.readings: list[Reading] = []
        self.written: dict[str, float] = {}
        self.versions: dict[str, object] = {}

    def prepare(self) -> None:
        """Install systems, write their corpora, save their states. What fails becomes a row that says why."""
        settings = self._arguments
        tokens, text = self._work / f"tokens-{settings.tokens}", self._work / f"text-{settings.text_bytes}"
        if set(settings.only) - {"text"}:
            write_tokens(tokens, settings.tokens)
        if "text" in settings.only:
            write_text(text, settings.text, settings.text_bytes)
        for name in settings.only:
            system = SYSTEMS[name]
            for seq_len in settings.seq_len[:1] if system.is_text else settings.seq_len:
                folder = self._work / f"{name}-{settings.tokens}-{seq_len}"
                job = Job("write", str(text if system.is_text else tokens), str(folder), seq_len=seq_len)
                job = replace(job, batch_size=settings.batch_size, seconds=settings.seconds)
                added = list(self._readings(name, job))
                self.readings += added
                self._make(name, job, added)

    def measure(self, round_number: int) -> None:
        """One round: everything once, in an order of its own."""
        order = [reading for reading in self.readings if not reading.row.problem]
        random.Random(round_number).shuffle(order)
        for place, reading in enumerate(order):
            row = reading.row
            _say(
                f"round {round_number + 1}, {place + 1} of {len(order)}: {row.system} {row.case}, {row.workers} workers"
            )
            warm(Path(reading.job.corpus))
            warm(Path(reading.job.folder))
            try:
                self._measure(reading)
            except Failure as failure:
                row.problem = str(failure)
        for reading in self.readings:  # a round that failed is a gap, so that the rounds of all rows are the same
            reading.row.rates += [None] * (round_number + 1 - len(reading.row.rates))

    def _make(self, name: str, job: Job, readings: list[Reading]) -> None:
        _say(f"{name}: environment and corpus")
        try:
            install(name, self._work)
            Path(job.folder).mkdir(parents=True, exist_ok=True)
            result = run(name, job, self._work)
        except Failure as failure:
            for reading in readings:
                reading.row.problem = str(failure)
            return
        self.versions[name] = result["versions"]
        self.written[f"{name} {job.seq_len}"] = float(str(result["write_s"]))
        for reading in readings:
            try:
                self._save(reading)
            except Failure as failure:
                reading.row.problem = str(failure)

    def _readings(self, name: str, job: Job) -> Iterator[Reading]:
        for case in SYSTEMS[name].cases:
            state = Path(job.folder).with_suffix(f".{case.name.replace(' ', '-')}-{case.workers}.state")
            own = replace(job, action=case.action, case=case.name, workers=case.workers, state=str(state))
            yield Reading(name, case, own, Row(name, case.name, case.workers, job.seq_len, case.action))
        if name != "ours":
            return
        for position in POSITIONS:  # no reading, only the time from a state that far in
            state = Path(job.folder).with_suffix(f".{position}.state")
            case = Case("windowed", 1, "resume", resumes=False)
            own = replace(job, action="resume", case=case.name, workers=case.workers, state=str(state))
            yield Reading(name, case, own, Row(name, f"windowed at {position:.0e}", 1, job.seq_len, "resume"))

    def _save(self, reading: Reading) -> None:
        """Save a state in the middle of an epoch, for our own positions one that says so."""
        job, state = reading.job, Path(reading.job.state)
        if reading.case.action == "resume":
            saved = next(
                other.job.state for other in self.readings if other.job.workers == 1 and other.job.case == job.case
            )
            content = json.loads(Path(saved).read_bytes()[1:])
            position = float(reading.row.case.split()[-1])
            state.write_bytes(b"J" + json.dumps({**content, "consumed": int(position)}).encode())
            reading.row.state_bytes = state.stat().st_size - 1
        if not reading.case.resumes:
            return
        middle = 16 if SYSTEMS[reading.system].is_text else self._arguments.tokens // job.seq_len // job.batch_size // 2
        result = run(reading.system, replace(job, action="save", position=middle), self._work)
        reading.row.state_bytes = int(str(result["state_bytes"]))
        reading.expected = result["next_batch"]

    def _measure(self, reading: Reading) -> None:
        row, job = reading.row, reading.job
        if job.action != "resume":
            result = run(reading.system, job, self._work)
            row.rates.append(float(str(result["tokens_per_second"])))
            if "startup_s" in result:
                row.startups.append(float(str(result["startup_s"])))
        if reading.case.resumes or job.action == "resume":
            result = run(reading.system, replace(job, action="resume"), self._work)
            row.resumes.append(float(str(result["resume_s"])))
        if reading.case.resumes:
            row.is_exact = row.is_exact is not False and result["next_batch"] == reading.expected


def main() -> None:
    arguments = _parse()
    comparison = Comparison(arguments)
    comparison.prepare()
    loads = []
    for round_number in range(arguments.rounds):
        loads.append(os.getloadavg()[0])
        comparison.measure(round_number)
    rows = [reading.row for reading in comparison.readings]
    print(*table(rows), sep="\n")
    if arguments.json is None:
        return
    facts = {
        "settings": vars(arguments),
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "cpu": _cpu(), "load_before": loads},
        "versions": comparison.versions,
        "write_s": comparison.written,
        "rows": [asdict(row) for row in rows],
    }
    arguments.json.write_text(json.dumps(facts, indent=2, default=str) + "\n", "utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description="Our data path beside its peers.")
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for environments and corpora, some 6 GB")
    add("--only", type=lambda text: text.split(","), default=list(SYSTEMS), help=f"some of {','.join(SYSTEMS)}")
    add("--tokens", type=int, default=64_000_000, help="size of the corpus of ids (default 64,000,000)")
    add(
        "--text",
        type=Path,
        nargs="+",
        default=SAMPLE,
        metavar="FILE",
        help="JSON Lines to repeat (default: the sample)",
    )
    # From 64 MiB on `data.prepare` leaves out the compression baselines, as it does for any corpus of real size.
    add("--text-bytes", type=int, default=80_000_000, help="size of the text (default 80,000,000)")
    add("--seq-len", type=int, nargs="+", default=[2048, 4096], help="lengths (default 2048 4096; text: the first)")
    add("--batch-size", type=int, default=32)
    add("--seconds", type=float, default=5.0, help="how long to read each time (default 5)")
    add("--rounds", type=int, default=5)
    add("--quick", action="store_true", help="small corpora, one short round: to see that all of it works")
    add("--json", type=Path, metavar="FILE", help="write everything measured as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(SYSTEMS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is unknown, there are {', '.join(SYSTEMS)}")
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
