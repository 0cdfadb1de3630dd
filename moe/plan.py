"""What a run costs on one device, before it runs: parameters, FLOPs, tokens, memory.

Takes the overrides of train.py:

    python -m moe.plan
    python -m moe.plan +experiment=moe_16b train.micro_batch_size=4 --tflops 400
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from moe.config import Config, ConfigError, compose
from moe.config.errors import require
from moe.memory import MicroBatch, activation_bytes, state_bytes, workspace_bytes

EXIT_CONFIG_ERROR = 78
COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}
SECONDS_A_DAY = 86_400
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        tflops = options.tflops
        require(tflops is None or 0 < tflops < math.inf, "--tflops", "above 0 and finite", tflops)
        facts = plan(compose(options.overrides), tflops)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR
    print(json.dumps(facts, indent=1) if options.json else "\n".join(_lines(facts)))
    return 0


def plan(config: Config, tflops: float | None = None) -> dict[str, Any]:
    """The facts of a run on one device: counts, FLOPs as the paper counts, bytes; device-days at `tflops` TFLOP/s."""
    model, seq_len, train = config.model.build(), config.data.seq_len, config.train
    tokens = train.steps * train.global_batch_size * seq_len
    flops = model.flops_per_token(seq_len)
    return {
        "name": config.name,
        "compute_dtype": train.compute_dtype,
        "micro_batch_size": train.micro_batch_size,
        "seq_len": seq_len,
        "activation_checkpointing": config.runtime.activation_checkpointing,
        "num_params": model.num_params(),
        "num_active_params": model.num_active_params(),
        "flops_per_token": flops,
        "flops_per_sequence": flops * seq_len,
        "flops": flops * tokens,
        "tokens": tokens,
        "tflops": tflops,
        "device_days": None if tflops is None else flops * tokens / (tflops * 1e12) / SECONDS_A_DAY,
        "memory_bytes": _memory(config),
    }


def _memory(config: Config) -> dict[str, Any]:
    """Bytes by part, activations and total both without ("kept") and with ("recomputed") activation checkpointing."""
    model, width = config.model.build(), COMPUTE_BYTES[config.train.compute_dtype]
    state = state_bytes(model, width)
    activations, workspace, total = {}, {}, {}
    for key, recompute in (("kept", False), ("recomputed", True)):
        batch = _micro_batch(config, recompute)
        activations[key], workspace[key] = activation_bytes(model, batch), workspace_bytes(model, batch)
        total[key] = sum(state.values()) + sum(activations[key].values()) + max(workspace[key].values())
    return {"state": state, "activations": activations, "workspace": workspace, "total": total}


def _micro_batch(config: Config, recompute: bool) -> MicroBatch:
    return MicroBatch(
        sequences=config.train.micro_batch_size,
        seq_len=config.data.seq_len,
        compute_bytes=COMPUTE_BYTES[config.train.compute_dtype],
        num_languages=max(1, len(config.data.weights)),
        loss_chunk_size=config.runtime.loss_chunk_size,
        fused_norms=config.runtime.device != "cpu",
        recompute=recompute,
    )


def _lines(facts: dict[str, Any]) -> list[str]:
    days = f", {facts['device_days']:,.1f} device-days at {facts['tflops']:g} TFLOP/s" if facts["tflops"] else ""
    batch = f"micro-batch {facts['micro_batch_size']} x {facts['seq_len']} tokens"
    return [
        f"{facts['name']} on one device, {facts['compute_dtype']}, {batch}",
        f"parameters         {facts['num_params']:>18,}",
        f"  active per token {facts['num_active_params']:>18,}",
        f"FLOPs per token    {facts['flops_per_token']:>18.4g}",
        f"  per sequence     {facts['flops_per_sequence']:>18.4g}",
        f"  of the run       {facts['flops']:>18.4g}{days}",
        f"tokens of the run  {facts['tokens']:>18,}",
        *_memory_lines(
            facts["memory_bytes"], chosen="recomputed" if facts["activation_checkpointing"] == "full" else "kept"
        ),
    ]


def _memory_lines(memory: dict[str, Any], chosen: str) -> list[str]:
    """A table in GiB; a column each without and with activation checkpointing."""
    columns = ("kept", "recomputed")
    rows = [(part, [size, size]) for part, size in memory["state"].items() if size]
    activations = memory["activations"]
    for part in dict.fromkeys(part for column in columns for part in activations[column]):
        rows.append((part, [activations[column].get(part, 0) for column in columns]))
    rows.append(("larger workspace", [max(memory["workspace"][column].values()) for column in columns]))
    rows.append(("total", [memory["total"][column] for column in columns]))
    marks = [" (as configured)" if column == chosen else "" for column in columns]
    head = f"memory, GiB; activations kept{marks[0]}, or recomputed{marks[1]}"
    return [head, *(f"  {part:<18}" + "".join(f"{size / GIB:>12.3f}" for size in sizes) for part, sizes in rows)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for train.py; runtime.device=cpu plans for a CPU, else a GPU")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that the device reaches in training, for the device-days")
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
