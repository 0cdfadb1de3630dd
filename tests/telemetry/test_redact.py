from __future__ import annotations

import json
from typing import Any

import pytest

from moe.telemetry import redact

SECRET = "PLANTED-7f3a"


@pytest.mark.parametrize(
    "config",
    [
        {"hf_token": SECRET},
        {"wandb": {"api_key": SECRET}},
        {"WANDB_API_KEY": SECRET},
        {"aws": {"aws_secret_access_key": SECRET, "accessKey": SECRET}},
        {"store": [{"password": SECRET}, {"credentials": {"user": SECRET}}]},
        {"api_tokens": [SECRET, [SECRET]]},
        {"password": 0, "authToken": SECRET},
        {"source": f"https://user:{SECRET}@example.org/data.parquet"},
        {"source": [f"s3://{SECRET}@bucket/key"]},
        {"source": f"https://example.org/data?version=1&token={SECRET}"},
        {"command": f"python train.py data.hf_token={SECRET} optim.lr=0.1"},
        {"command": f"python train.py 'wandb.api_key=\"{SECRET} x\"'"},
    ],
)
def test_no_secret_survives(config: dict[str, Any]) -> None:
    assert SECRET in json.dumps(config)
    assert SECRET not in json.dumps(redact(config))


@pytest.mark.parametrize(
    "value", ["hf_abcdefghijklmnopqrstuv", "ghp_abcdefghijklmnop0123456789", "AKIAIOSFODNN7EXAMPLE"]
)
def test_issued_keys_are_found_under_innocent_names(value: str) -> None:
    assert value not in json.dumps(redact({"note": f"use {value}", "list": [value]}))


def test_a_numeric_password_is_redacted_and_a_missing_one_stays_missing() -> None:
    assert redact({"password": 1234, "api_key": None}) == {"password": "[redacted]", "api_key": None}


def test_what_is_no_secret_stays() -> None:
    config = {
        "tokens": 409600,
        "max_tokens_per_batch": 8192,
        "tokenizer": "data/sample/tokenizer.json",
        "tokenization": {"path": "x"},
        "num_experts_per_tok": 6,
        "source": "https://example.org/data@main.parquet",
        "revision": "0123456789abcdef0123456789abcdef01234567",
        "command": "python train.py optim.total_tokens=1e9 model.n=3",
        "nothing": None,
        "flag": True,
        "list": [1, 2.5, "text"],
    }
    assert redact(config) == config


def test_the_argument_is_not_changed() -> None:
    config = {"nested": {"token": SECRET}}
    redact(config)
    assert config == {"nested": {"token": SECRET}}
