"""The whole way: a run with its report, a sweep, a dense variant, every backend of the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_helpers import final_state, metrics, train

from moe.telemetry import read_metrics


def test_run_leaves_metrics_samples_and_a_report(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, "train.steps=6", "telemetry.report=true", 'telemetry.prompts={en:["The"],zh:["第"]}')
    folder = tmp_path / "t" / "r"
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [3, 6]
    assert set(rows[-1]["validation"]["by_language"]) == {"en", "zh"}
    experts = rows[0]["experts"]
    assert [layer["layer"] for layer in experts] == [0, 1]
    assert sum(experts[0]["load"]) == pytest.approx(len(experts[0]["load"]), abs=0.01)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == 6 * 4 * 32
    assert summary["baselines"]["en"]["validation_bytes"] > 1_000
    assert {row["language"] for row in json.loads((folder / "samples.json").read_text())} == {"en", "zh"}
    assert (folder / "report.html").stat().st_size > 100_000


def test_gradient_accumulation_changes_no_metric(tmp_path: Path, cache: Path) -> None:
    """Losses agree to rounding; expert counts, labels and tokens exactly."""
    train(tmp_path / "whole", cache, "train.steps=3", "train.log_interval=1", "model.bias_update_speed=0.01")
    train(
        tmp_path / "parts",
        cache,
        "train.steps=3",
        "train.log_interval=1",
        "model.bias_update_speed=0.01",
        "train.micro_batch_size=1",
    )
    for whole, parts in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        if "loss" in whole:
            assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert parts["expert_balance_loss"] == pytest.approx(whole["expert_balance_loss"], rel=1e-5)
            assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    first_whole, first_parts = metrics(tmp_path / "whole")[0], metrics(tmp_path / "parts")[0]
    assert first_whole["experts"][0]["load"] == first_parts["experts"][0]["load"]


def test_granularity_sweep_runs_four_iso_parameter_models(tmp_path: Path, cache: Path) -> None:
    # the helper's fixed run name would put all four in one folder; the hash keeps them apart
    output = train(
        tmp_path, cache, "-m", "+sweep=granularity", "train.steps=2", "run=null", "model.standard_ffn_size=64"
    )
    runs = sorted((tmp_path / "t").iterdir())
    assert len(runs) == 4, output
    lines = [line for line in output.splitlines() if "parameters" in line]
    assert len(lines) == 4


@pytest.mark.parametrize("variant", ["dense", "hash_layer", "switch", "gshard"])
def test_baselines_train(tmp_path: Path, cache: Path, variant: str) -> None:
    train(tmp_path, cache, f"+variant={variant}", "train.steps=4")
    losses = [row["loss"] for row in metrics(tmp_path) if "loss" in row]
    assert losses[-1] < 9.2
    assert final_state(tmp_path)["step"] == "step-00000004"


def test_recomputation_and_every_balance_term_train(tmp_path: Path, cache: Path) -> None:
    terms = ["model.device_aux_loss_alpha=0.05", "model.n_device_groups=4", "model.router_z_loss_alpha=0.001"]
    train(tmp_path / "kept", cache, "train.steps=4", *terms)
    train(tmp_path / "recomputed", cache, "train.steps=4", *terms, "runtime.activation_checkpointing=full")
    assert {"expert_balance_loss", "device_balance_loss", "router_z_loss"} <= set(metrics(tmp_path / "kept")[0])
    assert final_state(tmp_path / "kept")["shards"] == final_state(tmp_path / "recomputed")["shards"]


def test_a_sweep_goes_on_after_a_bad_point_and_says_so_at_the_end(tmp_path: Path, cache: Path) -> None:
    secret = "telemetry.wandb_project='api_key=planted'"
    output = train(tmp_path, cache, "-m", "train.steps=2", "run=null", "data.seq_len=99999,32", secret, code=78)
    assert "error: data.seq_len" in output
    assert [folder.name for folder in (tmp_path / "t").iterdir()]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]
