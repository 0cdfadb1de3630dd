"""A plan as a picture: memory against what the GPU has, and time, as one bar each."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from moe.planning.table import GIB, memory_parts

WIDTH, LEFT, BAR_WIDTH, BAR_HEIGHT, LINE = 860, 30, 800, 38, 22
STYLE = """
  svg { --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #8c959f; }
  @media (prefers-color-scheme: dark) { svg { --paper: #0d1117; --ink: #f0f6fc; --soft: #9198a1; --rule: #6e7681; } }
  text { font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; fill: var(--ink); }
  .title { font-size: 18px; font-weight: 600; } .head { font-size: 15px; font-weight: 600; }
  .note { font-size: 13px; } .frame { fill: none; stroke: var(--rule); }
"""


def draw(facts: dict[str, Any]) -> str:
    """An SVG document, for light and dark pages."""
    best, capacity = facts["best"], facts["gpu"]["memory_gib"]
    memory = {name: size / GIB for name, size in memory_parts(best["memory_bytes"]).items()}
    seconds = {name: 1e3 * value for name, value in best["seconds"].items()}
    title = f"{facts['name']} on {facts['gpus']} {facts['gpu']['device_name']}: {best['layout']}"
    head = f"Memory: {sum(memory.values()):.1f} of {capacity:g} GiB"
    body: list[str] = []
    bottom = 60
    rate = f"{best['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
    time = f"Step: {sum(seconds.values()):,.0f} ms, {rate}, {best['mfu']:.1%} MFU"
    for name, values, unit, whole in ((head, memory, "GiB", capacity), (time, seconds, "ms", 0.0)):
        shown = {key: value for key, value in values.items() if value > 0.001 * sum(values.values())}
        body += _bar(name, shown, unit, whole, bottom)
        bottom += 2 * LINE + BAR_HEIGHT + LINE * ((len(shown) + 2) // 3) + 14
    frame = f'<rect width="{WIDTH}" height="{bottom}" rx="10" style="fill: var(--paper)"/>'
    label = f'<text x="{LEFT}" y="36" class="title">{escape(title)}</text>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" role="img"'
    described = f'{opening} aria-label="{escape(title)}. {escape(head)}. {escape(time)}.">'
    return "\n".join([described, f"<style>{STYLE}</style>", frame, label, *body, "</svg>", ""])


def _bar(head: str, values: dict[str, float], unit: str, whole: float, top: int) -> Iterator[str]:
    """A heading, the values end to end along `whole` (or what they fill, if that is more), and their names."""
    scale = BAR_WIDTH / max(whole, sum(values.values()))
    yield f'<text x="{LEFT}" y="{top + 14}" class="head">{escape(head)}</text>'
    x, bar = float(LEFT), top + LINE
    for index, (name, value) in enumerate(values.items()):
        color = f"hsl({(205 + 47 * index) % 360}, 48%, 55%)"
        yield (
            f'<rect x="{x:.1f}" y="{bar}" width="{value * scale:.1f}" height="{BAR_HEIGHT}" fill="{color}">'
            f"<title>{escape(name)}: {value:,.2f} {unit}</title></rect>"
        )
        x += value * scale
        across, down = LEFT + index % 3 * BAR_WIDTH // 3, bar + BAR_HEIGHT + LINE * (1 + index // 3)
        yield f'<rect x="{across}" y="{down - 11}" width="12" height="12" rx="2" fill="{color}"/>'
        yield f'<text x="{across + 18}" y="{down}" class="note">{escape(name)} {value:,.1f}</text>'
    if whole:
        yield (
            f'<rect x="{LEFT}" y="{bar}" width="{whole * scale:.1f}" height="{BAR_HEIGHT}" class="frame">'
            f"<title>{whole:g} {unit}</title></rect>"
        )
