"""`python -m moe.generate` on a run that the trainer itself has left."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data import Tokenizer
from moe import generate, training
from moe.checkpoint import CheckpointError, CheckpointManager
from moe.config import compose, load_config
from moe.model import Transformer
from moe.model.sampling import choose, continuation
from moe.trained import load_trained, newest_run

TOKENIZER = Path(__file__).parents[1] / "data" / "sample" / "tokenizer.json"
POSITIONS = 48
CHINESE = "学而时习之，不亦说乎？鼷鼱𠮷"
PROMPTS = ["The old man", "他说"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two steps of a very small model."""
    folder = tmp_path_factory.mktemp("generate")
    rows = [{"text": f"{i} the old man and the sea. " * 20, "lang": "en", "source": "made"} for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    widths = ["hidden_size=32", "num_hidden_layers=2", "num_attention_heads=2", "standard_ffn_size=32", "granularity=2"]
    model = [*widths, "expert_budget=4", f"max_position_embeddings={POSITIONS}", "initializer_range=0.5"]
    overrides = [
        *(f"model.{value}" for value in model),
        "data=text",
        f"+data.sources.en.path={folder / 'text.jsonl'}",
        f"data.tokenizer={TOKENIZER}",
        "data.seq_len=16",
        *("train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=2", "optim.schedule.warmup_steps=1"),
        *("train.compute_dtype=bfloat16", "runtime.device=cpu", "checkpoint.interval=1"),
        *(f"data.cache_dir={folder / 'cache'}", f"output_dir={folder / 'outputs'}", "run=small"),
        *("telemetry.report=true", "+telemetry.prompts={en: [The sea]}"),
    ]
    training.run(compose(overrides), command=[])
    return folder / "outputs" / "moe_tiny" / "small"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert generate.main([*map(str, arguments), "--json", "--device", "cpu"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The single line of a failing command."""
    capsys.readouterr()
    assert generate.main([*map(str, arguments), "--device", "cpu"]) in (77, 78)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_bfloat16_run_ends_with_samples_and_keeps_its_tokenizer(run: Path) -> None:
    assert json.loads((run / "samples.json").read_text(encoding="utf-8"))[0]["prompt"] == "The sea"
    assert (run / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()


def test_loads_the_trained_weights_of_the_asked_step(run: Path) -> None:
    first, last = (load_trained(run, step, torch.device("cpu"), torch.float32) for step in (1, None))
    assert (first.step, last.step) == (1, 2)
    assert not torch.equal(first.model.lm_head.weight, last.model.lm_head.weight)  # type: ignore[union-attr]
    assert not last.model.training
    rounded = load_trained(run, None, torch.device("cpu"), torch.bfloat16).model
    for (name, exact), cast in zip(last.model.named_parameters(), rounded.parameters(), strict=True):
        dtype = torch.float32 if name.endswith("gate.weight") else torch.bfloat16
        assert torch.equal(cast, exact.to(dtype)), name
        assert cast.dtype == dtype, name


def test_the_part_of_a_checkpoint_is_loaded_strictly(run: Path) -> None:
    manager = CheckpointManager(run / "checkpoints")
    model = Transformer(load_config(run / "config.yaml").model.build())
    tensors = dict(model.state_dict())
    with pytest.raises(CheckpointError, match="in the checkpoint, but nothing here takes it"):
        manager.load({"model": tensors})
    del tensors["norm.weight"]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: in the checkpoint"):
        manager.load({"model": tensors}, partial=True)


@torch.no_grad()
def test_greedy_with_the_cache_is_greedy_without_it(run: Path) -> None:
    model, tokenizer, _, _ = load_trained(run, None, torch.device("cpu"), torch.float32)
    ids = [tokenizer.bos_id, *tokenizer.encode("The old man 他说")]
    cached = list(continuation(model, ids, 12, temperature=0))
    for token in cached:
        logits = model.lm_head.logits(model(torch.tensor([ids])).hidden[0, -1])  # type: ignore[union-attr]
        assert token == int(logits.argmax())
        ids.append(token)
    assert len(set(cached)) > 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_seed_decides_the_text(run: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    def completions(*options: object) -> list[dict[str, Any]]:
        prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        found: list[dict[str, Any]] = run_json(capsys, run, *prompts, "--dtype", dtype, *options)["completions"]
        return found

    first = completions("--seed", 3)
    assert [entry["prompt"] for entry in first] == PROMPTS
    assert all(entry["tokens"] > 5 for entry in first)
    assert completions("--seed", 3) == first
    assert completions("--seed", 4) != first
    assert completions("--greedy") == completions("--temperature", 0, "--seed", 9)


def test_text_is_streamed_with_headings_and_cut_at_the_last_position(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_json(capsys, run, "--prompt", PROMPTS[0], "--max-new-tokens", 1000)["completions"][0]
    tokens = len(Tokenizer.load(TOKENIZER).encode(PROMPTS[0])) + 1
    assert whole["tokens"] == POSITIONS - tokens
    arguments = [run, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-new-tokens", 1000, "--device", "cpu"]
    assert generate.main([*map(str, arguments)]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(
        f"--- prompt 1 of 2\n{PROMPTS[0]}{whole['completion']}\n--- prompt 2 of 2\n{PROMPTS[1]}"
    )
    assert f"{run}, step 2" in output.err


def test_prompts_come_from_standard_input(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPTS[0]}\n\n{PROMPTS[1]}"))
    completions = run_json(capsys, run, "--max-new-tokens", 2)["completions"]
    assert [entry["prompt"] for entry in completions] == PROMPTS


def test_chinese_is_streamed_whole_characters_at_a_time() -> None:
    tokenizer = Tokenizer.load(TOKENIZER)
    ids = tokenizer.encode(CHINESE)
    assert any(generate.REPLACEMENT in tokenizer.decode([token]) for token in ids), "no character spans tokens"
    pieces = list(generate.stream_text(tokenizer, ids))
    assert "".join(pieces) == CHINESE
    assert generate.REPLACEMENT not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 5


def test_broken_sequences_stream_as_they_decode() -> None:
    tokenizer = Tokenizer.load(TOKENIZER)
    rare = tokenizer.encode("𠮷鼱")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        picks = torch.randint(0, 3 * len(rare), (12,), generator=generator).tolist()
        ids = [rare[pick % len(rare)] if pick < 2 * len(rare) else 300 + pick for pick in picks]
        assert "".join(generate.stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_characters_appear_with_the_token_that_ends_them() -> None:
    tokenizer = Tokenizer.load(TOKENIZER)
    ids = tokenizer.encode("a𠮷b")
    seen = ""
    for length, piece in enumerate(generate.stream_text(tokenizer, ids), start=1):
        seen += piece
        assert seen == tokenizer.decode(ids[:length]).rstrip(generate.REPLACEMENT)


def test_choose_follows_temperature_and_top_p() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    draws = 4000

    def frequencies(temperature: float, top_p: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        chosen = [choose(probabilities.log(), temperature, top_p, generator) for _ in range(draws)]
        return torch.bincount(torch.tensor(chosen), minlength=4) / draws

    assert torch.allclose(frequencies(1.0, 1.0), probabilities, atol=0.03)
    squared = probabilities**2 / (probabilities**2).sum()
    assert torch.allclose(frequencies(0.5, 1.0), squared, atol=0.03)
    assert torch.allclose(frequencies(1.0, 0.75), torch.tensor([0, 0.625, 0, 0.375]), atol=0.03)
    assert frequencies(1.0, 0.4).tolist() == [0, 1, 0, 0]
    assert frequencies(1e-45, 1.0).tolist() == [0, 1, 0, 0]


def test_newest_run_is_the_one_with_the_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run with a checkpoint"):
        newest_run(tmp_path)
    for name, time in (("b", 100), ("c", 300), ("a", 200)):
        folder = tmp_path / "moe" / name / "checkpoints"
        CheckpointManager(folder, asynchronous=False).save(1, {"x": torch.zeros(1)}, {})
        os.utime(folder / "step-00000001", (time, time))
    (tmp_path / "moe" / "empty" / "checkpoints").mkdir(parents=True)
    assert newest_run(tmp_path) == tmp_path / "moe" / "c"


def test_user_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ("--prompt", "x")
    assert "must leave one of the model's 48 positions" in failure(capsys, run, "--prompt", "sea " * 60)
    assert "config.yaml: no such file" in failure(capsys, tmp_path / "none", *prompt)
    assert "step 7: no such checkpoint" in failure(capsys, run, *prompt, "--step", 7)
    assert "--top-p must be above 0" in failure(capsys, run, *prompt, "--top-p", 0)
    assert "--temperature must be at least 0" in failure(capsys, run, *prompt, "--temperature", "nan")
    assert "--max-new-tokens must be at least 1" in failure(capsys, run, *prompt, "--max-new-tokens", 0)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in failure(capsys, copy, *prompt)
    shutil.copyfile(run / "tokenizer.json", copy / "tokenizer.json")
    shutil.rmtree(copy / "checkpoints")
    assert "no checkpoint here yet" in failure(capsys, copy, *prompt)
