"""What a person sees while training: one bar on a terminal, plain aligned lines in a log."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm


class ConsoleLogger:
    """Progress of one run, as a tqdm bar (`is_terminal`) or one line a logging step."""

    def __init__(self, total_steps: int, is_terminal: bool, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self._stream = stream or sys.stdout
        self._bar: tqdm[Any] | None = None
        if is_terminal:
            layout = "{n_fmt}/{total_fmt} {bar} {percentage:3.0f}%{postfix}"
            self._bar = tqdm(total=total_steps, file=self._stream, bar_format=layout, dynamic_ncols=True)

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one row of metrics.jsonl, its training part, its validation part, or both."""
        if "loss" in row:
            self._show_progress(row)
        if "validation" in row:
            self.message(validation_line(row["step"], row["validation"], len(str(self.total_steps))))

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
            return
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show_progress(self, row: Mapping[str, Any]) -> None:
        if self._bar is None:
            self.message(progress_line(row, self.total_steps))
            return
        self._bar.n = row["step"]
        self._bar.set_postfix_str(f"loss {number(row['loss'], '.4f')}, {_pace(row, self.total_steps)}", refresh=True)


def progress_line(row: Mapping[str, Any], total_steps: int) -> str:
    """`step  100/2000    5%  loss 4.1000 (en 4.00, zh 4.20)  lr 1.00e-03  grad 0.90  12,345 tokens/s, ETA 0:12:30`."""
    width = len(str(total_steps))
    languages = ", ".join(f"{name} {number(loss, '.2f')}" for name, loss in row.get("loss_by_language", {}).items())
    parts = [
        f"step {row['step']:>{width}}/{total_steps} {row['step'] / max(total_steps, 1):5.0%}",
        f"loss {number(row['loss'], '7.4f')}" + (f" ({languages})" if languages else ""),
    ]
    if "lr" in row:
        parts.append(f"lr {number(row['lr'], '.2e')}")
    if "grad_norm" in row:
        parts.append(f"grad {number(row['grad_norm'], '6.3f')}")
    parts += [part for part in (_balance(row), _pace(row, total_steps)) if part]
    if row.get("skipped_steps"):
        parts.append(f"{row['skipped_steps']} skipped")
    return "  ".join(parts)


def validation_line(step: int, validation: Mapping[str, Any], width: int = 0) -> str:
    """`step  100 validation  loss 4.1000, 1.900 bits/byte  (en 4.0000, 1.850; zh 4.2000, 1.950)`."""
    details = "; ".join(f"{name} {_scores(scores, '')}" for name, scores in validation.get("by_language", {}).items())
    line = f"step {step:>{width}} validation  loss {_scores(validation, ' bits/byte')}"
    return f"{line}  ({details})" if details else line


def remaining_seconds(row: Mapping[str, Any], total_steps: int) -> float | None:
    """Seconds to the last step at the row's speed and the run's mean tokens a step; None when the row lacks them.

    Stateless, hence right after a resume, too.
    """
    speed, step, tokens = row.get("tokens_per_second"), row["step"], row.get("tokens")
    if not (speed and step and tokens):
        return None
    return float((total_steps - step) * (tokens / step) / speed)


def number(value: float | None, spec: str) -> str:
    """Formatted, or `n/a` for a number that was not finite."""
    return "n/a" if value is None else format(value, spec)


def _scores(scores: Mapping[str, Any], unit: str) -> str:
    loss = number(scores.get("loss"), ".4f")
    if scores.get("bits_per_byte") is None:
        return loss
    return f"{loss}, {scores['bits_per_byte']:.3f}{unit}"


def _balance(row: Mapping[str, Any]) -> str:
    experts = row.get("experts")
    if not experts:
        return ""
    worst = max(layer["max_violation"] for layer in experts)
    dead = sum(layer["dead"] for layer in experts)
    return f"MaxVio {worst:5.2f}" + (f" ({dead} dead)" if dead else "")


def _pace(row: Mapping[str, Any], total_steps: int) -> str:
    speed = row.get("tokens_per_second")
    if not speed:
        return ""
    remaining = remaining_seconds(row, total_steps)
    eta = "" if remaining is None else f", ETA {datetime.timedelta(seconds=round(remaining))}"
    return f"{speed:9,.0f} tokens/s{eta}"
