"""Plotly figures as plain dicts. The page chooses the colours of text, grid and diverging scales by its scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Figure = dict[str, Any]
Points = tuple[list[float], list[float | None]]
YAxis = Literal["linear", "from zero", "log"]
Y_AXES: dict[YAxis, dict[str, str]] = {
    "linear": {"tickformat": "~g"},
    "from zero": {"rangemode": "tozero"},
    "log": {"type": "log", "tickformat": "~g", "dtick": "D2"},
}

PALETTE = ("#3f7fd6", "#d9534a", "#2f9e77", "#c98a1b", "#8a63d2", "#3aa5b5", "#b0577f", "#7a8a3a")
MAX_POINTS = 800
# Values in one heat map over time; more rows are averaged into fewer bins.
MAX_CELLS = 240_000


@dataclass(frozen=True)
class Line:
    name: str
    points: Points
    color: str
    markers: bool = False
    dash: str = "solid"


def points(rows: Sequence[dict[str, Any]], *path: str, x: str = "step") -> Points:
    """(x, value) of the rows that have the value at `path`; a null is kept as a gap."""
    xs: list[float] = []
    ys: list[float | None] = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT and row.get(x) is not None:
            xs.append(row[x])
            ys.append(value)
    return xs, ys


_ABSENT = object()


def layer_points(rows: Sequence[dict[str, Any]], layer: int, name: str) -> Points:
    """(step, value) of one layer's expert statistic."""
    found = [(row["step"], item[name]) for row in rows for item in row["experts"] if item["layer"] == layer]
    return [step for step, _ in found], [value for _, value in found]


def line_chart(lines: Sequence[Line], y_title: str, x_title: str = "step", y_axis: YAxis = "linear") -> Figure:
    """Lines over a common x axis, thinned to MAX_POINTS each."""
    data = [_trace(line) for line in lines if line.points[0]]
    layout = {
        "xaxis": {"title": {"text": x_title}},
        "yaxis": {"title": {"text": y_title}} | Y_AXES[y_axis],
        "hovermode": "x unified" if len(data) <= 8 else "closest",
        "showlegend": 1 < len(data) <= 12,
    }
    return {"data": data, "layout": layout}


def depth_color(index: int, count: int) -> str:
    """Violet for the first layer, over red, to amber for the last."""
    hue = (265 + 135 * index / max(count - 1, 1)) % 360
    return f"hsl({hue:.0f}, 55%, 56%)"


def line_color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def heat_map(
    z: Sequence[Sequence[float | None]],
    x: Sequence[float],
    y: Sequence[float],
    titles: tuple[str, str, str],
    scale: str,
    limits: tuple[float, float],
) -> Figure:
    """z: (len(y), len(x)). titles: x axis, y axis, colour bar. `scale` is a diverging scale known to the page."""
    trace = {
        "type": "heatmap",
        "z": [_rounded(row) for row in z],
        "x": list(x),
        "y": list(y),
        "zmin": limits[0],
        "zmax": limits[1],
        "meta": scale,
        "colorbar": {"title": {"text": titles[2], "side": "right"}, "thickness": 12, "outlinewidth": 0},
        "hovertemplate": f"{titles[0]} %{{x}}<br>{titles[1]} %{{y}}<br>{titles[2]} %{{z:.2f}}<extra></extra>",
    }
    y_axis: dict[str, Any] = {"title": {"text": titles[1]}, "autorange": "reversed" if titles[1] == "layer" else True}
    if len(y) <= 16:
        y_axis["tickvals"] = list(y)
    return {"data": [trace], "layout": {"xaxis": {"title": {"text": titles[0]}}, "yaxis": y_axis}}


def load_over_time(rows: Sequence[dict[str, Any]], layers: Sequence[int]) -> Figure:
    """One heat map (experts x time bins) per layer; the page switches between `frames`."""
    by_step = [(row["step"], {item["layer"]: item["load"] for item in row["experts"]}) for row in rows]
    experts = max(len(load) for _, loads in by_step for load in loads.values())
    bins = _bins(len(by_step), max(12, min(160, MAX_CELLS // (len(layers) * experts))))
    steps = [by_step[stop - 1][0] for _, stop in bins]
    frames = [
        [_rounded(row) for row in _transposed_means([loads.get(layer, []) for _, loads in by_step], bins, experts)]
        for layer in layers
    ]
    peak = max((value for frame in frames for row in frame for value in row if value is not None), default=2.0)
    figure = heat_map(frames[0], steps, range(experts), ("step", "expert", "load"), "load", load_limits(peak))
    return figure | {"frames": frames, "labels": [f"layer {layer}" for layer in layers]}


def load_limits(peak: float) -> tuple[float, float]:
    """Colour range around the uniform share 1: symmetric, so that the neutral colour means uniform."""
    reach = min(1.0, max(0.25, peak - 1.0))
    return 1.0 - reach, 1.0 + reach


def specialisation(loads: dict[str, list[float]], first: str, other: str) -> list[float | None]:
    """Per expert, from -1 (only `first`) to 1 (only `other`), both languages counted as equally frequent."""
    pairs = zip(loads.get(first, []), loads.get(other, []), strict=True)
    return [(b - a) / (a + b) if a + b else None for a, b in pairs]


def _trace(line: Line) -> dict[str, Any]:
    x, y = _thinned(line.points[0]), _thinned(line.points[1])
    return {
        "type": "scatter",
        "mode": "lines+markers" if line.markers or len(x) == 1 else "lines",
        "name": line.name,
        "x": x,
        "y": [None if value is None else float(f"{value:.6g}") for value in y],
        "line": {"color": line.color, "width": 1.6, "dash": line.dash},
        "marker": {"size": 7},
        "hovertemplate": f"{line.name} %{{y:.4~g}}<extra></extra>",
    }


def _thinned(values: list[Any]) -> list[Any]:
    """Every n-th value counted from the end, so that the last one stays."""
    stride = math.ceil(len(values) / MAX_POINTS)
    return values[::-1][:: max(stride, 1)][::-1]


def _bins(count: int, limit: int) -> list[tuple[int, int]]:
    """`count` rows cut into at most `limit` runs of nearly equal length."""
    number = min(count, limit)
    edges = [count * index // number for index in range(number + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _transposed_means(
    loads: Sequence[Sequence[float]], bins: Sequence[tuple[int, int]], experts: int
) -> list[list[float | None]]:
    """(rows, experts) -> (experts, bins): the mean over each bin, None where a bin has no value."""
    columns: list[list[float | None]] = []
    for start, stop in bins:
        present = [load for load in loads[start:stop] if load]
        columns.append([sum(load[e] for load in present) / len(present) if present else None for e in range(experts)])
    return [list(row) for row in zip(*columns, strict=True)]


def _rounded(row: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 2) for value in row]
