"""Numbers of a run for people and for programs."""

from __future__ import annotations

import datetime
from typing import Any

from moe.telemetry.run_folder import Run


def run_facts(run: Run) -> dict[str, Any]:
    """The headline figures of a run, machine-readable; None where the run folder does not tell."""
    last = run.rows[-1]
    training = run.training[-1] if run.training else {}
    validation = run.validations[-1]["validation"] if run.validations else {}
    facts = {
        "name": run.name,
        "folder": str(run.folder),
        "steps": run.summary.get("steps", last["step"]),
        "tokens": run.summary.get("tokens", training.get("tokens")),
        "loss": training.get("loss"),
        "validation_loss": validation.get("loss"),
        "validation": validation.get("by_language", {}),
        "baselines": run.summary.get("baselines", {}),
        "tokens_per_second": _median(
            [row["tokens_per_second"] for row in run.training if row.get("tokens_per_second")]
        ),
        "skipped_steps": training.get("skipped_steps"),
    }
    names = ("num_params", "num_active_params", "flops_per_token", "training_seconds", "peak_memory_gib", "device")
    return facts | {name: run.summary.get(name) for name in names}


def headline(run: Run) -> list[tuple[str, str]]:
    """(label, value) of the known figures, in reading order."""
    facts = run_facts(run)
    seconds = facts["training_seconds"]
    shown = [
        ("Parameters", quantity(facts["num_params"])),
        ("Active per token", quantity(facts["num_active_params"])),
        ("FLOPs per token", quantity(facts["flops_per_token"])),
        ("Tokens", quantity(facts["tokens"])),
        ("Steps", quantity(facts["steps"])),
        ("Training time", None if seconds is None else duration(seconds)),
        ("Tokens per second", quantity(facts["tokens_per_second"])),
        ("Validation loss", quantity(facts["validation_loss"])),
        ("Peak memory", None if facts["peak_memory_gib"] is None else f"{facts['peak_memory_gib']:.2f} GiB"),
        ("Device", facts["device"]),
        ("Skipped steps", quantity(facts["skipped_steps"]) if facts["skipped_steps"] else None),
    ]
    return [(label, value) for label, value in shown if value is not None]


def compression_rows(run: Run) -> list[dict[str, Any]]:
    """Bits per byte of each language beside xz, with bar lengths in percent of the longest bar of all."""
    facts = run_facts(run)
    languages = []
    for name in run.languages:
        baselines = facts["baselines"].get(name, {})
        bars = [
            ("this model", facts["validation"].get(name, {}).get("bits_per_byte")),
            ("xz -9, primed with the training text", baselines.get("xz_primed_bits_per_byte")),
            ("xz -9", baselines.get("xz_bits_per_byte")),
        ]
        known = [(label, value) for label, value in bars if value is not None]
        if known:
            languages.append({"language": name, "bytes": baselines.get("validation_bytes"), "bars": known})
    longest = max((value for language in languages for _, value in language["bars"]), default=1.0)
    for language in languages:
        language["bars"] = [(label, value, 100 * value / longest) for label, value in language["bars"]]
    return languages


def quantity(value: float | None) -> str | None:
    """`1234` as 1,234; large numbers with three digits and k/M/B/T; fractions with three digits."""
    if value is None:
        return None
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, days before them when there are any."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
