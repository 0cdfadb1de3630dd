from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import TokenCorpus, Tokenizer, TokenStream
from data.inspect import main


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


def test_stats(inspect, small_corpus: TokenCorpus) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = inspect(small_corpus.folder, "stats", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["digest"] == small_corpus.digest
    for language in ("en", "zh"):
        source = small_corpus.split("train").source(language)
        assert facts["splits"]["train"][language]["tokens"] == source.num_tokens
        assert facts["baselines"][language] == vars(small_corpus.manifest.validation[language])
    assert str(small_corpus.split("train").source("zh").num_tokens) in inspect(small_corpus.folder, "stats")[1]


def test_verify(inspect, damaged, small_folder: Path) -> None:  # type: ignore[no-untyped-def]
    assert inspect(small_folder, "verify")[:2] == (0, f"{small_folder}: intact, 8 files\n")
    assert json.loads(inspect(small_folder, "verify", "--json")[1])["intact"] is True
    name = "validation-en-00000.bin"
    broken = damaged(lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[::-1]))
    code, out, error = inspect(broken, "verify")
    assert (code, out) == (77, "")
    assert error == f"error: {broken / name}: content does not match the manifest, prepare the corpus again\n"


def test_peek_prints_the_sequence_training_sees(inspect, small_corpus: TokenCorpus) -> None:  # type: ignore[no-untyped-def]
    stream = TokenStream(small_corpus, 128, {"en": "0.7", "zh": "0.3"}, seed=4)
    tokenizer = Tokenizer.load(small_corpus.tokenizer_path)
    options = ("--seq-len", 128, "--seed", 4, "--weight", "en=0.7", "--weight", "zh=0.3")
    for index in range(8):
        row = stream[index]
        facts = json.loads(inspect(small_corpus.folder, "peek", index, *options, "--json")[1])
        documents = facts["documents"]
        assert (facts["index"], facts["row"], facts["epoch"]) == (index, row.source_row, 0)
        assert sum(document["tokens"] for document in documents) == 128
        assert sum(document["from_start"] for document in documents) == row.document_starts.sum()
        if len(documents) == 1:
            assert documents[0]["text"] == tokenizer.decode(row.input_ids.tolist())
        plain = inspect(small_corpus.folder, "peek", index, *options)[1]
        assert all(document["text"] in plain for document in documents)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("peek", -1), "INDEX: -1 is negative"),
        (("peek", 0, "--seq-len", 0), "seq_len: 0 is too small"),
        (("peek", 0, "--weight", "en"), "--weight: write LANGUAGE=SHARE"),
        (("peek", 0, "--weight", "de=1"), "weights: name de, the corpus has en, zh"),
    ],
)
def test_bad_arguments(inspect, arguments, reason: str, small_folder: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, error = inspect(small_folder, *(("--", *arguments) if arguments[1] == -1 else arguments))
    assert (code, out) == (77, "")
    assert error.startswith(f"error: {reason}")
    assert error.count("\n") == 1


COMMANDS = """
import runpy, sys
for module in ("data.inspect", "data.prepare", "data.tokenizer"):
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code == 0
sys.argv = ["data.inspect", "nowhere", "stats"]
runpy.run_module("data.inspect", run_name="__main__", alter_sys=True)
"""


def test_commands_start_clean() -> None:
    """No warning, no traceback: help of every command, and a missing folder."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COMMANDS], cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr == "error: nowhere: no such corpus folder, `python -m data.prepare` makes one\n"
    assert done.returncode == 77
    for module in ("data.inspect", "data.prepare", "data.tokenizer"):
        assert f"usage: python -m {module}" in done.stdout
