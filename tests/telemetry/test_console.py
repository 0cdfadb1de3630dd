from __future__ import annotations

import io
from typing import Any

import pytest

from moe.telemetry import ConsoleLogger
from moe.telemetry.console import remaining_seconds

ROW: dict[str, Any] = {
    "step": 100,
    "tokens": 409_600,
    "loss": 4.1,
    "loss_by_language": {"en": 4.0, "zh": 4.2},
    "lr": 1e-3,
    "grad_norm": 0.9,
    "skipped_steps": 0,
    "tokens_per_second": 4096.0,
    "experts": [{"layer": 1, "max_violation": 0.4, "dead": 2, "entropy": 0.9, "load": [], "load_by_language": {}}],
}
VALIDATION = {
    "step": 100,
    "validation": {
        "loss": 4.0,
        "bits_per_byte": 1.9,
        "by_language": {
            "en": {"loss": 3.9, "bits_per_byte": 1.8, "tokens": 10, "bytes": 30},
            "zh": {"loss": 4.1, "bits_per_byte": None, "tokens": 10, "bytes": 30},
        },
    },
}


def _lines(*rows: dict[str, Any]) -> list[str]:
    stream = io.StringIO()
    logger = ConsoleLogger(2000, is_terminal=False, stream=stream)
    for row in rows:
        logger.log(row)
    logger.close()
    return stream.getvalue().splitlines()


def test_a_log_has_one_plain_line_a_row() -> None:
    assert _lines(ROW) == [
        "step  100/2000    5%  loss  4.1000 (en 4.00, zh 4.20)  lr 1.00e-03  grad  0.900  "
        "MaxVio  0.40 (2 dead)      4,096 tokens/s, ETA 0:31:40"
    ]


def test_lines_are_aligned() -> None:
    later = ROW | {"step": 1990, "tokens": 1990 * 4096, "loss": 12.3, "grad_norm": 10.5}
    first, second = _lines(ROW, later)
    assert first.index("lr") == second.index("lr")
    assert first.index("tokens/s") == second.index("tokens/s")


def test_a_validation_only_row() -> None:
    assert _lines(VALIDATION) == ["step  100 validation  loss 4.0000, 1.900 bits/byte  (en 3.9000, 1.800; zh 4.1000)"]


def test_both_parts_and_skipped_steps_are_shown() -> None:
    lines = _lines(ROW | VALIDATION | {"skipped_steps": 3})
    assert len(lines) == 2
    assert lines[0].endswith("3 skipped")


def test_null_numbers_are_readable() -> None:
    (line,) = _lines({"step": 1, "loss": None, "grad_norm": None})
    assert "loss n/a  grad n/a" in line


def test_a_terminal_gets_one_bar_and_messages_above_it() -> None:
    stream = io.StringIO()
    logger = ConsoleLogger(2000, is_terminal=True, stream=stream)
    logger.log(ROW)
    logger.message("warning: something")
    logger.close()
    output = stream.getvalue()
    assert "\r100/2000" in output
    assert "loss 4.1000" in output
    assert "ETA 0:31:40" in output
    assert "warning: something\n" in output


@pytest.mark.parametrize("missing", ["tokens", "tokens_per_second"])
def test_no_eta_without_speed(missing: str) -> None:
    row = {key: value for key, value in ROW.items() if key != missing}
    assert remaining_seconds(row, 2000) is None
    assert "ETA" not in _lines(row)[0]
