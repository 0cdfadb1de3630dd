"""One page over several runs, for sweeps and ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe.telemetry import figures as fig
from moe.telemetry.facts import quantity, run_facts
from moe.telemetry.report import Candidate, present, write_page
from moe.telemetry.run_folder import Run, load_run


def write_comparison(run_folders: Sequence[Path], path: Path) -> Path:
    """Overlay several runs in one self-contained page at `path`; raises ValueError naming a bad file."""
    runs = [load_run(folder) for folder in run_folders]
    names = distinct_names(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(
        path,
        "comparison.html.j2",
        title=f"{len(runs)} run{'s' if len(runs) > 1 else ''} compared",
        names=names,
        colors=[fig.line_color(index) for index in range(len(runs))],
        table_rows=fact_table(runs),
        differences=config_differences([run.config for run in runs]),
        sections=[{"title": "Side by side", "note": "", "charts": comparison_charts(runs, names)}],
    )
    return path


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; the folder is added where two are equal."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({run.folder})" for name, run in zip(names, runs, strict=True)]


def fact_table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(label, one cell a run), rows without any value left out."""
    labels = {
        "num_params": "parameters",
        "num_active_params": "active parameters",
        "flops_per_token": "FLOPs per token",
        "tokens": "tokens",
        "steps": "steps",
        "tokens_per_second": "tokens per second",
        "peak_memory_gib": "peak memory (GiB)",
        "loss": "training loss",
        "validation_loss": "validation loss",
    }
    facts = [run_facts(run) for run in runs]
    rows = [(label, [quantity(fact[key]) for fact in facts]) for key, label in labels.items()]
    for language in dict.fromkeys(name for run in runs for name in run.languages):
        bits = [fact["validation"].get(language, {}).get("bits_per_byte") for fact in facts]
        rows.append((f"bits per byte, {language}", [quantity(value) for value in bits]))
    return [(label, [cell or "–" for cell in cells]) for label, cells in rows if any(cells)]


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(dotted key, one cell a run) of the keys whose values are not the same in all runs."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [str(config.get(key, "–")) for config in flat]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def comparison_charts(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Training and validation loss over tokens, balance and speed, one line a run."""
    for run in runs:
        _fill_tokens(run.rows)
    balance = [
        fig.Line(name, _worst_violation(run), fig.line_color(index))
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    candidates: list[Candidate] = [
        ("Training loss", _lines(runs, names, "loss"), "loss (nats per token)", "linear"),
        ("Validation loss", _lines(runs, names, "validation", "loss"), "loss (nats per token)", "linear"),
        ("Validation, bits per byte", _lines(runs, names, "validation", "bits_per_byte"), "bits per byte", "linear"),
        ("Gradient norm before clipping", _lines(runs, names, "grad_norm"), "gradient norm", "linear"),
        ("Throughput", _lines(runs, names, "tokens_per_second"), "tokens per second", "from zero"),
        ("Worst layer's busiest expert, load above the uniform share", balance, "max load − 1", "linear"),
    ]
    return present(candidates, x_title="tokens")


def _lines(runs: Sequence[Run], names: Sequence[str], *keys: str) -> list[fig.Line]:
    return [
        fig.Line(name, fig.points(run.rows, *keys, x="tokens"), fig.line_color(index), markers=keys[0] == "validation")
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]


def _worst_violation(run: Run) -> fig.Points:
    rows = [row for row in run.with_experts if row.get("tokens") is not None]
    return [row["tokens"] for row in rows], [max(item["max_violation"] for item in row["experts"]) for row in rows]


def _fill_tokens(rows: Sequence[dict[str, Any]]) -> None:
    """Give validation-only rows the token count of the row before them."""
    tokens = 0
    for row in rows:
        tokens = row.setdefault("tokens", tokens)
