"""A wrong key, type, value or combination is one line that names the key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from config_helpers import REPOSITORY, composed
from omegaconf import OmegaConf

from moe.config import ConfigError, load_config

# override(s), then what the line must contain
BAD = [
    ("bad=1", "unknown key bad"),
    ("experiment=moe_2b", "experiment: write it with a plus, as +experiment=NAME"),
    ("model.hiden_size=3", "unknown key model.hiden_size: did you mean model.hidden_size?"),
    ("lr=1", "unknown key lr: did you mean optim.lr?"),
    ("+optim.momentum=0.9", "optim.momentum"),
    ("optim.learning_rate=1", "unknown key optim.learning_rate: optim has lr, beta1, beta2, "),
    ("+model.extra=1", "unknown key model.extra"),
    ("model=moe_3b", "moe_3b"),
    ("+experiment=moe_9b", "moe_9b"),
    ("train.steps=many", "train.steps"),
    ("train.steps=0", "train.steps must be at least 1"),
    ("train.micro_batch_size=3", "train.micro_batch_size must be a divisor of train.global_batch_size=4"),
    ("train.compute_dtype=float16", "train.compute_dtype must be one of bfloat16, float32"),
    ("optim.lr=-1", "optim.lr must be above 0"),
    ("optim.lr=inf", "optim.lr must be finite"),
    ("optim.lr=null", "optim.lr"),
    ("optim.beta2=1", "optim.beta2 must be in [0, 1)"),
    ("optim.schedule.shape=linear", "optim.schedule.shape must be one of constant, cosine, multistep, wsd"),
    ("optim.schedule.warmup_steps=1101", "optim.schedule.warmup_steps must be between 0 and train.steps=1100"),
    ("optim.schedule.milestones=[0.9,0.8]", "optim.schedule.milestones must be rising"),
    ("model.granularity=0", "model.granularity must be at least 1"),
    ("model.vocab_size=9223372036854775808", "model.vocab_size must be below 2^31"),
    ("model.num_hidden_layers=100000000", "model.num_hidden_layers must be at most 10,000"),
    ("model.granularity=7", "model.granularity=7 misses model.expert_budget=8"),
    ("model.active_budget=9", "model.num_experts_per_tok must be between 1 and the 15 routed experts"),
    ("model.num_attention_heads=5", "model.num_attention_heads must be a divisor of 128"),
    ("model.num_key_value_heads=4", "model.num_key_value_heads must be a divisor of 2"),
    ("model.first_k_dense_replace=4", "model.first_k_dense_replace"),
    ("model.n_device_groups=32", "model.n_device_groups must be between 1 and the 15 routed experts"),
    ("model.scoring_func=tanh", "model.scoring_func must be one of sigmoid, softmax"),
    ("model.routing=hash", "model.aux_loss_alpha must be 0 with model.routing=hash"),
    ("model.dense_multiple=0", "model.dense_multiple must be null or at least 1"),
    ("data.seq_len=1025", "data.seq_len must be at most model.max_position_embeddings=1024"),
    ("+data.weights.en=-1", "data.weights.en must be at least 0"),
    ("data.sources.en.weight=-1", "data.sources.en.weight must be at least 0"),
    ("data.sources.en.weight=many", "data.sources.en: weight"),
    ("+data.sources.de.weight=1", "data.sources.de.path is missing"),
    ("+data.sources.de=3", "data.sources.de must be a path or a mapping"),
    ("data.mode=stream", "data.mode must be one of text, tokens"),
    ("data.packing=first_fit", "data.packing must be one of best_fit, chunk"),
    ("data.shuffle=none", "data.shuffle must be one of full, windowed"),
    ("data.skip_ranges=[[3,3]]", "data.skip_ranges must be rising"),
    ("data.skip_ranges=[[3]]", "data.skip_ranges must be pairs"),
    ("data.workers=-1", "data.workers must be between 0 and 256"),
    ("data.streams=0", "data.streams must be between 1 and 65536"),
    ("data.tokenizer=null", "data.tokenizer must name a tokenizer.json"),
    ("data.stages=[{start_step: 0, weights: {en: 1}}]", "data.stages must be rising in start_step, from 1 on"),
    ("train.batch_ramp=[[5,3]]", "train.batch_ramp must be of sizes that train.micro_batch_size=4 divides"),
    ("train.batch_ramp=[[5,4],[5,4]]", "train.batch_ramp must be rising"),
    ("data=prepared", "data.prepared must name a folder"),
    ("runtime.device=tpu", "runtime.device must be one of auto, cpu, cuda"),
    ("runtime.expert_backend=fast", "runtime.expert_backend must be one of"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last must be at least 1"),
    ("telemetry.wandb=yes", "telemetry.wandb must be one of disabled, offline, online"),
    ("name=a/b", "name must be a plain folder name"),
]


@pytest.mark.parametrize(("override", "expected"), BAD, ids=[override for override, _ in BAD])
def test_one_line_names_the_key(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(override)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bad=1"], "error: unknown key bad"),
        (["model.granularity=0"], "error: model.granularity must be at least 1, not 0"),
        (["+experiment=moe_9b"], "moe_9b"),
        (["optim=null"], "error: a config group (model, data, optim, experiment, variant, sweep) takes the name"),
    ],
    ids=["unknown key", "impossible value", "unknown group", "no group"],
)
def test_train_py_ends_with_one_line_and_78(arguments: list[str], expected: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 78
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_text_mode_cannot_fit_documents_it_has_not_seen() -> None:
    with pytest.raises(ConfigError, match="data.packing=best_fit needs all documents' lengths beforehand"):
        composed("data.mode=text", "data.packing=best_fit")


@pytest.mark.parametrize("key", ["data.seq_len", "runtime.device", "train.compute_dtype"])
def test_no_message_shows_a_secret_of_the_environment(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-value")
    with pytest.raises(ConfigError) as caught:
        composed(f"{key}=${{oc.env:MY_API_KEY}}")
    assert key in str(caught.value)
    assert "s3cr3t-value" not in str(caught.value)
    assert "$MY_API_KEY" in str(caught.value)


def test_a_saved_configuration_comes_back(tmp_path: Path) -> None:
    config = composed("+experiment=moe_2b", "optim.lr=0.25", "+data.weights.fr=2")
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.structured(config), path)
    assert load_config(path) == config


def test_a_missing_or_broken_saved_configuration_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match="config.yaml: no such file"):
        load_config(path)
    path.write_text("model: {hiden_size: 3}\n")
    with pytest.raises(ConfigError, match="config.yaml: .*hiden_size"):
        load_config(path)
