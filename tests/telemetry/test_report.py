from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from run_folders import COMPLETION, SECRET, make_run

from moe import report as command
from moe.telemetry import figures as fig
from moe.telemetry.comparison import config_differences, write_comparison
from moe.telemetry.report import run_sections, write_report
from moe.telemetry.run_folder import load_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _charts(folder: Path) -> dict[str, dict[str, Any]]:
    sections = run_sections(load_run(folder))
    return {chart["title"]: chart["figure"] for section in sections for chart in section["charts"]}


def _own_html(path: Path) -> str:
    """The page without the embedded plotly.js."""
    return re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_report_states_the_facts_beside_the_baselines(tmp_path: Path) -> None:
    html = _own_html(write_report(make_run(tmp_path / "run")))
    for text in ("11.5 M", "4.2 M", "983,040", "0:03:21", "1.234", "2.210", "2.610", "131,072 bytes", "4 of 5 words"):
        assert text in html


def test_text_is_escaped_and_secrets_are_left_out(tmp_path: Path) -> None:
    html = _own_html(write_report(make_run(tmp_path / "run")))
    assert COMPLETION not in html
    assert "&lt;script&gt;document.title" in html
    assert SECRET not in html


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    html = _own_html(write_report(make_run(tmp_path / "run")))
    assert re.findall(r"""(?:src|href)\s*=|url\(|@import""", html) == []
    assert "default-src 'none'" in html


def test_charts_hold_the_logged_numbers(tmp_path: Path) -> None:
    charts = _charts(make_run(tmp_path / "run"))
    loss = {trace["name"]: trace for trace in charts["Loss by language"]["data"]}
    assert loss["en train"]["x"][:2] == [10, 20]
    assert loss["zh train"]["y"][:2] == [9.0, 4.5]
    assert loss["zh validation"]["x"] == [40, 80, 120]
    assert charts["Gradient norm before clipping"]["data"][0]["y"][:3] == [1.0, None, 1.0]
    assert len(charts["Load of each expert over time"]["frames"]) == 3
    final = charts["Load of each expert at step 120"]["data"][0]
    assert (len(final["z"]), len(final["z"][0]), final["y"]) == (3, 8, [1, 2, 3])


def test_specialisation_is_signed_by_language() -> None:
    loads = {"en": [2.0, 0.0, 1.0, 0.0], "zh": [0.0, 3.0, 1.0, 0.0]}
    assert fig.specialisation(loads, "en", "zh") == [-1.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 0},
        {"languages": ("en",)},
        {"validate_every": 0},
        {"rows": 1, "validate_every": 0},
        {"summary": False},
        {"languages": ("en", "zh", "fr")},
    ],
)
def test_runs_of_any_shape_are_reported(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = make_run(tmp_path / "run", **shape)
    charts = _charts(folder)
    assert "Loss by language" in charts
    assert ("Load of each expert over time" in charts) == (shape.get("layers") != 0)
    assert sum("Which experts serve" in title for title in charts) == (
        0 if shape.get("layers") == 0 else len(shape.get("languages", ("en", "zh"))) - 1
    )
    assert write_report(folder).stat().st_size < 6_000_000


def test_a_validation_before_the_first_logged_step_is_enough(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", summary=False)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(next(row for row in rows if "validation" in row))
    assert "1.234" in _own_html(write_report(folder))


def test_large_runs_are_thinned(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=60, layers=40, experts=128)
    assert write_report(folder).stat().st_size < 8_000_000
    over_time = _charts(folder)["Load of each expert over time"]
    assert len(over_time["data"][0]["x"]) * 40 * 128 <= fig.MAX_CELLS
    assert over_time["data"][0]["x"][-1] == 600


def test_thinning_keeps_the_last_point_and_averages_loads() -> None:
    xs = list(range(5000))
    (trace,) = fig.line_chart([fig.Line("a", (xs, xs), "red")], "y")["data"]
    assert len(trace["x"]) <= fig.MAX_POINTS
    assert trace["x"][-1] == 4999
    rows = [{"step": step, "experts": [{"layer": 0, "load": [float(step % 2), 1.0]}]} for step in range(1, 1001)]
    figure = fig.load_over_time(rows, [0])
    assert len(figure["frames"][0][0]) == 160
    assert figure["frames"][0][0][0] == pytest.approx(0.5, abs=0.01)


def test_comparison_shows_what_differs(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", experts=4, seed=1)]
    html = _own_html(write_comparison(folders, tmp_path / "pages" / "comparison.html"))
    assert "model.experts" in html
    assert str(folders[0]) in html  # equal names are told apart by the folder
    assert SECRET not in html


def test_runs_without_rows_are_left_out_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b"), make_run(tmp_path / "c", experts=4)]
    (folders[1] / "metrics.jsonl").write_text("")
    page = tmp_path / "comparison.html"
    assert command.main([*map(str, folders), "--output", str(page)]) == 0
    assert "warning: left out: " + str(folders[1] / "metrics.jsonl") in capsys.readouterr().err
    assert str(folders[2]) in page.read_text(encoding="utf-8")
    assert command.main([*map(str, folders[:2]), "--output", str(page)]) == 0  # of one that is left
    assert command.main([str(folders[1]), str(folders[1])]) == 77


def test_config_differences_are_flattened() -> None:
    configs = [{"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9, "c": 2}}]
    assert config_differences(configs) == [("a.b", ["1", "9"]), ("d", ["3", "–"])]


def test_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run")
    assert command.main([str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(folder / "report.html")
    assert printed["runs"][0]["validation"]["en"]["bits_per_byte"] == 1.234


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", "{oops}\n"),
        ("metrics.jsonl", ""),
        ("summary.json", "{"),
        ("samples.json", "{}"),
        ("config.yaml", "- a\n"),
    ],
)
def test_a_bad_file_ends_in_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str
) -> None:
    folder = make_run(tmp_path / "run")
    (folder / file).write_text(content)
    assert command.main([str(folder)]) == 77
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(folder / file) in error
    assert error.count("\n") == 1


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 77
    assert str(tmp_path / "metrics.jsonl") in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium): page not rendered")
@pytest.mark.parametrize("page", ["report", "comparison"])
def test_chromium_draws_every_chart_without_a_complaint(tmp_path: Path, page: str) -> None:
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)]
    path = write_report(folders[0]) if page == "report" else write_comparison(folders, tmp_path / "comparison.html")
    expected = _own_html(path).count('class="chart"')
    dom, log = _render(path, tmp_path / "profile")
    assert expected >= 6
    drawn = re.findall(r'<div class="chart[^"]*"[^>]*>(?=<div class="plot-container)', dom)
    assert len(drawn) == expected
    assert "CONSOLE" not in log
    assert "pwned" not in re.findall(r"<title>(.*?)</title>", dom)


def _render(path: Path, profile: Path) -> tuple[str, str]:
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking"]
    result = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--disable-component-update",
         "--disable-sync", f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=8000",
         "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    return result.stdout, result.stderr
