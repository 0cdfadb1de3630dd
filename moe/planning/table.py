"""A plan as text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

GIB = 2**30
BAR = 40
MOST_LISTED = 10


def lines(facts: dict[str, Any]) -> Iterator[str]:
    best, gpu = facts["best"], facts["gpu"]
    step = best["step"]
    yield f"{facts['name']} on {facts['gpus']} {gpu['device_name']}, {facts['gpus_per_node']} a node: {best['layout']}"
    yield f"  parameters {facts['num_params']:,}, {facts['num_active_params']:,} of them active for a token"
    yield f"  micro-batches a step: {step['micro_batches']}, of {step['sequences']} x {step['seq_len']} tokens"
    yield f"  routed experts as {'quack or triton do' if step['fused_experts'] else 'grouped_mm does'} them"
    yield f"  FLOPs a token {facts['flops_per_token']:.4g}, of all {facts['tokens']:,} tokens"
    yield f"  {facts['flops_per_token'] * facts['tokens']:.4g} FLOPs in all: {facts['days']:,.1f} days"
    yield ""
    yield from _memory(best, gpu["memory_gib"])
    yield ""
    yield from _time(best)
    yield ""
    yield from _traffic(best["traffic"])
    yield from _ranking(facts["ranking"])
    verdict = "run it with" if best["fits"] else "nothing fits, more GPUs are needed; the leanest is"
    yield f"{verdict}: {_start(facts)} {shlex.join([*facts['asked'], *best['overrides']])}"


def _start(facts: dict[str, Any]) -> str:
    gpus, per_node = facts["gpus"], facts["gpus_per_node"]
    if gpus == 1:
        return "python train.py"
    if gpus <= per_node:
        return f"torchrun --nproc_per_node={gpus} train.py"
    return f"NODES={-(-gpus // per_node)} HOST=... launch/torchrun.sh"


def _memory(best: dict[str, Any], capacity: float) -> Iterator[str]:
    yield f"memory, GiB of the fullest rank ({capacity:g} there are)"
    parts = memory_parts(best["memory_bytes"])
    for name, size in parts.items():
        if size:
            yield f"  {name:<24}{size / GIB:>9.3f}  {_bar(size / GIB / capacity)}"
    verdict = "" if best["fits"] else "   does not fit"
    yield f"  {'peak':<24}{best['peak_bytes'] / GIB:>9.3f}  {_bar(best['peak_bytes'] / GIB / capacity)}{verdict}"


def memory_parts(memory: dict[str, Any]) -> dict[str, int]:
    """What makes up the peak: the largest workspace, and gradients where they are what peaks."""
    workspace = max(memory["workspace"], key=memory["workspace"].get)
    passing: dict[str, int] = memory["pass"] | {f"workspace: {workspace}": memory["workspace"][workspace]}
    if memory["gradients"] > sum(passing.values()):
        passing = {"gradients": memory["gradients"]}
    return memory["state"] | passing


def _time(best: dict[str, Any]) -> Iterator[str]:
    yield "time, ms a step (the last four: exchanges that nothing hides)"
    total = best["step_seconds"]
    for name, seconds in best["seconds"].items():
        yield f"  {name:<24}{1e3 * seconds:>9.1f}  {_bar(seconds / total)}"
    rate = best["tokens_per_second_per_gpu"]
    yield f"  {'step':<24}{1e3 * total:>9.1f}  {rate:,.0f} tokens/s a GPU, {best['mfu']:.1%} MFU"


def _traffic(terms: list[dict[str, Any]]) -> Iterator[str]:
    if not terms:
        return
    yield f"{'traffic, GiB a step and rank':<36}{'axis':<14}{'ranks':>6}{'calls':>8}{'whole':>11}{'sent':>11}"
    for term in terms:
        name = f"  {term['collective']} {term['purpose']}"
        sizes = f"{term['bytes'] / GIB:>11.4f}{term['wire_bytes'] / GIB:>11.4f}"
        yield f"{name:<36}{term['axis']:<14}{term['ranks']:>6}{term['calls']:>8}{sizes}"
    yield ""


def _ranking(ranking: list[dict[str, Any]]) -> Iterator[str]:
    fitting = [entry for entry in ranking if entry["fits"]]
    yield f"{len(ranking)} layouts are legal, {len(fitting)} fit{'; the leanest' if not fitting else ''}"
    yield f"  {'tokens/s a GPU':>14}{'MFU':>8}{'GiB':>8}  layout, micro-batch, recomputed, resharded"
    for entry in (fitting or ranking)[:MOST_LISTED]:
        size, recompute, reshard = (text.partition("=")[2] for text in _choices(entry["overrides"]))
        figures = f"{entry['tokens_per_second_per_gpu']:>14,.0f}{entry['mfu']:>8.1%}{entry['peak_bytes'] / GIB:>8.1f}"
        yield f"  {figures}  {entry['layout']}, {size}, {recompute}, {reshard}"


def _choices(overrides: list[str]) -> list[str]:
    keys = ("train.micro_batch_size", "runtime.activation_checkpointing", "parallel.reshard")
    return [text for key in keys for text in overrides if text.startswith(key)]


def _bar(share: float) -> str:
    return "#" * round(BAR * min(share, 1.0))
