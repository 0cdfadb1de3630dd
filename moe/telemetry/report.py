"""report.html: everything a reader wants to know of a run, in one file without network access."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from moe.telemetry import figures as fig
from moe.telemetry.facts import compression_rows, headline, quantity
from moe.telemetry.run_folder import Run, load_run

Chart = dict[str, Any]
Candidate = tuple[str, list[fig.Line], str, fig.YAxis]  # title, lines, title and kind of the y axis


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run folder from the files that are in it; raises ValueError naming a bad file."""
    run = load_run(run_folder)
    path = run_folder / "report.html"
    write_page(
        path,
        "report.html.j2",
        title=run.name,
        facts=headline(run),
        compression=compression_rows(run),
        command=run.summary.get("command"),
        sections=run_sections(run),
        samples=run.samples,
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        environment=run.summary.get("environment", {}),
    )
    return path


def write_page(path: Path, template: str, **context: Any) -> None:
    """Render one of the templates beside this file, with plotly.js inside; replaces `path` atomically."""
    environment = Environment(
        loader=PackageLoader("moe", "telemetry"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template(template).render(plotly=get_plotlyjs(), **context)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)


def run_sections(run: Run) -> list[dict[str, Any]]:
    """Titled groups of charts; groups without data are left out."""
    sections = [
        (
            "Learning",
            "Cross-entropy alone, without balance terms. Validation is text the model never trains on.",
            learning_charts(run),
        ),
        ("Expert load", _load_note(run), load_charts(run)),
        ("Languages", _language_note(run), language_charts(run)),
        ("Balance over time", "One line a layer, from the first (violet) to the last (amber).", balance_charts(run)),
        ("Speed and memory", "", speed_charts(run)),
    ]
    return [{"title": title, "note": note, "charts": charts} for title, note, charts in sections if charts]


def chart(title: str, figure: fig.Figure, wide: bool = False, height: int = 280) -> Chart:
    return {"title": title, "figure": figure, "wide": wide, "height": height}


def learning_charts(run: Run) -> list[Chart]:
    charts = []
    lines = [
        fig.Line(f"{name} train", fig.points(run.rows, "loss_by_language", name), fig.line_color(index))
        for index, name in enumerate(run.languages)
    ] or [fig.Line("train", fig.points(run.rows, "loss"), fig.PALETTE[0])]
    lines += [
        fig.Line(
            f"{name} validation",
            fig.points(run.rows, "validation", "by_language", name, "loss"),
            fig.line_color(index),
            markers=True,
            dash="dot",
        )
        for index, name in enumerate(run.languages)
    ]
    charts.append(chart("Loss by language", fig.line_chart(lines, "loss (nats per token)"), wide=True, height=360))
    bits = [
        fig.Line(
            name,
            fig.points(run.rows, "validation", "by_language", name, "bits_per_byte"),
            fig.line_color(index),
            markers=True,
        )
        for index, name in enumerate(run.languages)
    ]
    candidates: list[Candidate] = [
        ("Validation, bits per byte", bits, "bits per byte", "linear"),
        ("Learning rate", _single(run, "lr"), "learning rate", "linear"),
        ("Gradient norm before clipping", _single(run, "grad_norm"), "gradient norm", "linear"),
    ]
    return charts + present(candidates)


def load_charts(run: Run) -> list[Chart]:
    if not run.with_experts:
        return []
    last = run.with_experts[-1]
    layers = [item["layer"] for item in last["experts"]]
    width = max(len(item["load"]) for item in last["experts"])
    peak = max(max(item["load"]) for item in last["experts"])
    final = fig.heat_map(
        [item["load"] for item in last["experts"]],
        range(width),
        layers,
        ("expert", "layer", "load"),
        "load",
        fig.load_limits(peak),
    )
    over_time = fig.load_over_time(run.with_experts, layers)
    return [
        chart("Load of each expert over time", over_time, wide=True, height=_map_height(width)),
        chart(f"Load of each expert at step {last['step']:,}", final, wide=True, height=_map_height(len(layers))),
    ]


def language_charts(run: Run) -> list[Chart]:
    if not run.with_experts or len(run.languages) < 2:
        return []
    last = run.with_experts[-1]
    charts = []
    first = run.languages[0]
    for other in run.languages[1:]:
        z = [fig.specialisation(item.get("load_by_language", {}), first, other) for item in last["experts"]]
        layers = [item["layer"] for item in last["experts"]]
        titles = ("expert", "layer", f"{first} ← → {other}")
        figure = fig.heat_map(z, range(max(map(len, z))), layers, titles, "language", (-1.0, 1.0))
        charts.append(
            chart(f"Which experts serve {first}, which {other}", figure, wide=True, height=_map_height(len(z)))
        )
    return charts


def balance_charts(run: Run) -> list[Chart]:
    terms = {
        "expert_balance_loss": "expert-level balance",
        "device_balance_loss": "device-level balance",
        "router_z_loss": "router z-loss",
    }
    lines = [
        fig.Line(label, fig.points(run.rows, name), fig.PALETTE[index])
        for index, (name, label) in enumerate(terms.items())
    ]
    lines = [line for line in lines if any(line.points[1])]
    candidates: list[Candidate] = [
        (
            "Busiest expert's load above the uniform share (MaxVio)",
            _by_layer(run, "max_violation"),
            "max load − 1",
            "linear",
        ),
        ("Experts without a token", _by_layer(run, "dead"), "dead experts", "linear"),
        ("Router entropy (1 = undecided)", _by_layer(run, "entropy"), "entropy / log(experts)", "linear"),
        ("Balance losses, mean over layers, factors included", lines, "loss term", "log"),
    ]
    return present(candidates)


def speed_charts(run: Run) -> list[Chart]:
    candidates: list[Candidate] = [
        ("Throughput", _single(run, "tokens_per_second"), "tokens per second", "from zero"),
        ("Arithmetic speed", _single(run, "tflops"), "TFLOP/s", "from zero"),
        ("Model FLOPs utilisation", _single(run, "mfu"), "fraction of peak", "from zero"),
        ("Memory", _single(run, "memory_gib"), "GiB", "from zero"),
    ]
    return present(candidates)


def present(candidates: Sequence[Candidate], x_title: str = "step") -> list[Chart]:
    """Charts of the candidates that have a value to show; the last fills its row of the two-column grid."""
    charts = [
        chart(title, fig.line_chart(lines, y_title, x_title, y_axis))
        for title, lines, y_title, y_axis in candidates
        if any(value is not None for line in lines for value in line.points[1])
    ]
    if len(charts) % 2:
        charts[-1]["wide"] = True
    return charts


def _single(run: Run, name: str) -> list[fig.Line]:
    return [fig.Line(name, fig.points(run.rows, name), fig.PALETTE[0])]


def _by_layer(run: Run, name: str) -> list[fig.Line]:
    if not run.with_experts:
        return []
    layers = [item["layer"] for item in run.with_experts[-1]["experts"]]
    return [
        fig.Line(f"layer {layer}", fig.layer_points(run.with_experts, layer, name), fig.depth_color(index, len(layers)))
        for index, layer in enumerate(layers)
    ]


def _load_note(run: Run) -> str:
    if not run.with_experts:
        return ""
    experts = run.with_experts[-1]["experts"]
    worst = max(experts, key=lambda item: item["max_violation"])
    total, dead = sum(len(item["load"]) for item in experts), sum(item["dead"] for item in experts)
    served = f"{dead:,} of {total:,} experts got no token" if dead else f"each of the {total:,} experts got tokens"
    return (
        f"Tokens per routed expert, as a multiple of the uniform share. At the end the busiest expert, in layer "
        f"{worst['layer']}, has {quantity(worst['max_violation'] + 1)} times its share, and {served}. "
        f"Colours end at the limits of the bar."
    )


def _language_note(run: Run) -> str:
    if len(run.languages) < 2:
        return ""
    return (
        "How far each expert's tokens come from one language, both counted as equally frequent: a muted cell serves "
        "them alike. From the last logged step."
    )


def _map_height(rows: int) -> int:
    return max(180, min(640, 110 + 22 * rows))
