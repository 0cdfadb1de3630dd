"""`python -m moe.checkpoint verify|list FOLDER`: what a folder of checkpoints holds, and whether it is intact."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moe.checkpoint.coordinator import describe
from moe.checkpoint.folders import CheckpointFolder
from moe.checkpoint.manifest import CheckpointError, read_manifest
from moe.checkpoint.reading import verify_folder

EXIT_DATA_ERROR = 77


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 77 if there is no checkpoint or any is not intact."""
    options = _parser().parse_args(arguments)
    held = _checkpoints(options.folder)
    if not held:
        print(f"error: {options.folder}: no checkpoints (folders named step-00000100) here", file=sys.stderr)
        return EXIT_DATA_ERROR
    facts = [_examine(folder, step, deep=options.command == "verify") for step, folder in held.items()]
    print(json.dumps(facts, indent=1) if options.json else "\n".join(_line(fact, options.command) for fact in facts))
    broken = [fact for fact in facts if fact["error"]]
    if broken:
        print(f"error: {len(broken)} of {len(facts)} checkpoints are not intact", file=sys.stderr)
    return EXIT_DATA_ERROR if broken else 0


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Those of a run folder, of its checkpoints/ folder, or the one that `folder` itself is."""
    within = CheckpointFolder(folder / "checkpoints").steps() or CheckpointFolder(folder).steps()
    beside = CheckpointFolder(folder.resolve().parent).steps()
    return within or {step: path for step, path in beside.items() if path.name == folder.resolve().name}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (("verify", "read every file and compare digests"), ("list", "read the manifests only")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("folder", type=Path, help="a run folder, its checkpoints/ or one of these")
        command.add_argument("--json", action="store_true", help="print a JSON list")
    return parser


def _examine(folder: Path, step: int, *, deep: bool) -> dict[str, Any]:
    fact: dict[str, Any] = {"step": step, "path": str(folder), "error": None}
    try:
        manifest = verify_folder(folder, step) if deep else read_manifest(folder, step)
    except (CheckpointError, OSError) as error:
        return {**fact, "error": describe(error)}
    sizes = {"files": len(manifest.files), "bytes": manifest.total_bytes}
    return {**fact, **sizes, "world_size": manifest.world_size, "torch_version": manifest.torch_version}


def _line(fact: dict[str, Any], command: str) -> str:
    name = Path(fact["path"]).name
    if fact["error"]:
        return f"{name}  NOT INTACT  {fact['error']}"
    megabytes = fact["bytes"] / 1e6
    state = "intact" if command == "verify" else "not verified"
    return f"{name}  {state}  {fact['files']} files, {megabytes:,.1f} MB, {fact['world_size']} rank(s)"


if __name__ == "__main__":
    sys.exit(main())
