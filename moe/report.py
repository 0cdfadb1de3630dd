"""`python -m moe.report RUN_FOLDER [RUN_FOLDER ...]`: write report.html, or one page comparing several runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.telemetry.comparison import write_comparison
from moe.telemetry.facts import quantity, run_facts
from moe.telemetry.report import write_report
from moe.telemetry.run_folder import NoRowsError, load_run

EXIT_DATA_ERROR = 77


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        folders = _begun(options.run_folder)
        is_comparison = len(options.run_folder) > 1
        page = _write(folders, options.output, is_comparison)
        facts = [run_facts(load_run(folder)) for folder in folders]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DATA_ERROR
    if options.json:
        print(json.dumps({"report": str(page), "runs": facts}, ensure_ascii=False, indent=2))
        return 0
    for fact in facts:
        print(_line(fact))
    print(page)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.report", description=__doc__)
    parser.add_argument("run_folder", type=Path, nargs="+", help="outputs/<experiment>/<run>; several are compared")
    parser.add_argument("--output", type=Path, help="page comparing several runs (default: comparison.html)")
    parser.add_argument("--json", action="store_true", help="print the runs' figures as JSON")
    return parser


def _begun(folders: Sequence[Path]) -> Sequence[Path]:
    """Those of several that hold rows; the others are named. All of them where none does."""
    begun = []
    for folder in folders if len(folders) > 1 else ():
        try:
            load_run(folder)
        except NoRowsError as error:
            print(f"warning: left out: {error}", file=sys.stderr)
        else:
            begun.append(folder)
    return begun or folders


def _write(folders: Sequence[Path], output: Path | None, is_comparison: bool) -> Path:
    if is_comparison:
        return write_comparison(folders, output or Path("comparison.html"))
    if output is not None:
        raise ValueError("--output is for comparisons of several runs; one run's report lies in its own folder")
    return write_report(folders[0])


def _line(fact: dict[str, Any]) -> str:
    bits = ", ".join(
        f"{name} {scores['bits_per_byte']:.3f} bits/byte"
        for name, scores in fact["validation"].items()
        if scores.get("bits_per_byte") is not None
    )
    validation = f", validation loss {quantity(fact['validation_loss'])} ({bits})" if fact["validation"] else ""
    return f"{fact['name']}: {quantity(fact['steps'])} steps{validation}"


if __name__ == "__main__":
    sys.exit(main())
