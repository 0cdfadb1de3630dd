from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TOKENIZER

from data import StreamSpec, TokenCorpus, Tokenizer, TokenStream
from data.inspect import main, open_run
from data.pipeline import open_loader
from data.prepare import prepare

Inspect = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


def write_run(folder: Path, **data: object) -> Path:
    """A run folder as far as its configuration goes."""
    defaults = {
        "mode": "tokens",
        "prepared": None,
        "sources": {},
        "tokenizer": str(TOKENIZER),
        "cache_dir": str(folder / "cache"),
        "seq_len": 32,
        "weights": {"en": 0.7, "zh": 0.3},
        "stages": [],
        "shuffle": "windowed",
        "packing": "chunk",
        "intra_document_masking": False,
        "skip_ranges": [],
        "streams": 4,
        "validation_tokens": 64,
    }
    train = {"global_batch_size": 8, "batch_ramp": [[2, 4]], "seed": 3}
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": defaults | data, "train": train}))
    return folder


def test_stats(inspect: Inspect, small_corpus: TokenCorpus) -> None:
    code, out, _ = inspect(small_corpus.folder, "stats", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["digest"] == small_corpus.digest
    for name in ("en", "zh"):
        source = small_corpus.split("train").source(name)
        assert facts["splits"]["train"][name]["tokens"] == source.num_tokens
        assert facts["baselines"][name] == vars(small_corpus.manifest.validation[name])
    assert str(small_corpus.split("train").source("zh").num_tokens) in inspect(small_corpus.folder, "stats")[1]


def test_verify(inspect: Inspect, damaged: Callable[..., Path], small_folder: Path) -> None:
    assert inspect(small_folder, "verify")[:2] == (0, f"{small_folder}: intact, 8 files\n")
    assert json.loads(inspect(small_folder, "verify", "--json")[1])["intact"] is True
    name = "validation-en-00000.bin"
    broken = damaged(lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[::-1]))
    code, out, error = inspect(broken, "verify")
    assert (code, out) == (77, "")
    assert error == f"error: {broken / name}: content does not match the manifest, prepare the corpus again\n"


def test_peek_prints_the_sequence_training_sees(inspect: Inspect, small_corpus: TokenCorpus) -> None:
    stream = TokenStream(small_corpus, StreamSpec.single_stage(128, {"en": "0.7", "zh": "0.3"}, seed=4))
    tokenizer = Tokenizer.load(small_corpus.tokenizer_path)
    options = ("--seq-len", 128, "--seed", 4, "--weight", "en=0.7", "--weight", "zh=0.3")
    batch = stream.batch(range(8))
    for index in range(8):
        facts = json.loads(inspect(small_corpus.folder, "peek", index, *options, "--json")[1])
        documents, place = facts["documents"], stream.place(index)
        assert (facts["index"], facts["row"], facts["epoch"], facts["source"]) == (index, place.row, 0, place.source)
        assert sum(document["tokens"] for document in documents) == 128
        assert sum(document["from_start"] for document in documents) == int(batch.document_starts[index].sum())
        if len(documents) == 1:
            assert documents[0]["text"] == tokenizer.decode(batch.input_ids[index].tolist())
        plain = inspect(small_corpus.folder, "peek", index, *options)[1]
        assert all(document["text"] in plain for document in documents)


@pytest.mark.parametrize("mode", ["tokens", "text"])
def test_replay_prints_what_every_rank_read(
    mode: str, inspect: Inspect, small_sources: list[Path], tmp_path: Path
) -> None:
    sources = {path.stem: {"path": str(path), "weight": 1.0} for path in small_sources}
    run = write_run(tmp_path / "run", mode=mode, sources=sources)
    stream, sizes = open_run(run)
    tokenizer = Tokenizer.load(TOKENIZER)
    step = 4
    rows = [json.loads(line) for line in inspect(run, "replay", step, "--ranks", 2, "--json")[1].splitlines()]
    assert [row["index"] for row in rows] == list(range(sizes.first_sequence(3), sizes.first_sequence(4)))
    assert sorted(row["rank"] for row in rows) == [0] * 4 + [1] * 4

    for rank in range(2):
        loader = open_loader(
            stream, sizes, sizes.sizes[0] // 2, dp_rank=rank, dp_size=2, workers=0, prefetch=1, report=print
        )
        read = [next(loader) for _ in range(step)][-1]
        loader.close()
        ids = np.concatenate([batch.input_ids.numpy() for batch in read])
        shown = [row for row in rows if row["rank"] == rank]
        for one, row in zip(ids, shown, strict=True):
            assert sum(document["tokens"] for document in row["documents"]) == 32
            if len(row["documents"]) == 1:
                assert row["documents"][0]["text"] == tokenizer.decode(one.tolist())
    assert inspect(run, "replay", step)[1].count("--- ") == sum(len(row["documents"]) for row in rows)


def test_diff_of_corpora(inspect: Inspect, small_sources: list[Path], small_folder: Path, tmp_path: Path) -> None:
    same = prepare(small_sources, TOKENIZER, tmp_path / "same")
    assert inspect(small_folder, "diff", same)[1] == "training could not tell them apart\n"
    fewer = tmp_path / "en.jsonl"
    fewer.write_text("".join(small_sources[0].read_text(encoding="utf-8").splitlines(keepends=True)[:-2]), "utf-8")
    other = prepare([fewer, small_sources[1]], TOKENIZER, tmp_path / "other", seed=1)
    facts = json.loads(inspect(small_folder, "diff", other, "--json")[1])
    assert facts["equal"] is False
    assert "seed: 0 -> 1" in facts["differences"]
    assert any("documents only in the first, 0 only in the second" in line for line in facts["differences"])
    assert "train zh: the same documents in another order or number" in facts["differences"]
    alone = prepare([small_sources[0]], TOKENIZER, tmp_path / "alone")
    assert "source zh: only in the first" in inspect(small_folder, "diff", alone)[1]


def test_diff_of_runs_names_the_first_sequence_that_differs(
    inspect: Inspect, small_folder: Path, tmp_path: Path
) -> None:
    runs = [
        write_run(tmp_path / name, prepared=str(small_folder), skip_ranges=ranges)
        for name, ranges in (("a", []), ("b", []), ("c", [[5, 9]]))
    ]
    assert inspect(runs[0], "diff", runs[1])[1] == "training could not tell them apart\n"
    lines = inspect(runs[0], "diff", runs[2])[1].splitlines()
    assert lines == ["skip_ranges: [] -> [[5, 9]]", "first sequence from another place: 5"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("peek", "0", "--seq-len", "1000000"), "one sequence needs 1000001"),
        (("peek", "0", "--weight", "en"), "write SOURCE=SHARE"),
        (("peek", "0", "--weight", "en=1"), "the text has en, zh"),
        (("peek", "0", "--weight", "en=x", "--weight", "zh=1"), "weights.en: 'x' is not a number"),
        (("replay", "1"), "config.yaml: no such file"),
        (("diff", "/nowhere"), "/nowhere: no such corpus folder"),
    ],
)
def test_bad_requests(arguments: tuple[str, ...], reason: str, inspect: Inspect, small_folder: Path) -> None:
    code, out, error = inspect(small_folder, *arguments)
    assert (code, out) == (77, "")
    assert reason in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(("0",), "the first step is 1"), (("3", "--ranks", "3"), "3 does not divide the 8 sequences of step 3")],
)
def test_bad_replays(
    arguments: tuple[str, ...], reason: str, inspect: Inspect, small_folder: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", prepared=str(small_folder))
    code, _, error = inspect(run, "replay", *arguments)
    assert code == 77
    assert reason in error


def test_a_run_that_never_was_is_refused(inspect: Inspect, tmp_path: Path) -> None:
    for content in ("data: {}", "- 1", "{", "data: {mode: 3}\ntrain: {}"):
        (tmp_path / "config.yaml").write_text(content)
        code, _, error = inspect(tmp_path, "replay", 1)
        assert code == 77
        assert "not the configuration of a run" in error
        assert error.count("\n") == 1


def test_it_is_a_command(small_folder: Path) -> None:
    command = [sys.executable, "-m", "data.inspect", str(small_folder), "stats"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "bytes/token" in result.stdout


def test_it_ends_quietly_when_its_reader_has_seen_enough(small_folder: Path) -> None:
    command = [sys.executable, "-m", "data.inspect", str(small_folder), "peek", "0"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")
