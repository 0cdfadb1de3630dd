"""Preparing a corpus: what is in the folder, what it does not depend on, what is refused."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import SOURCES, TOKENIZER, documents_of

from data import DataError, Document, TokenCorpus, Tokenizer
from data.baseline import xz_bits_per_byte, xz_primed_bits_per_byte
from data.prepare import Filters, Selection, prepare
from data.prepare.__main__ import main
from data.sources import SourceSpec
from data.split import HELD_OUT, SPLIT_KEY, is_held_out, keyed_hash


def sample_documents() -> list[Document]:
    return [document for source in SOURCES for document in documents_of(source)]


def rows(path: Path, texts: list[str], language: str = "en") -> Path:
    lines = [json.dumps({"text": text, "lang": language}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def numbered(count: int) -> list[str]:
    return [f"This is text number {number}." for number in range(count)]


def texts_of(corpus: TokenCorpus, split: str, name: str) -> list[str]:
    source = corpus.split(split).source(name)
    ends = source.document_ends().astype(np.int64)
    pieces = np.split(source.tokens(0, source.num_tokens), ends[:-1])
    tokenizer = Tokenizer.load(corpus.tokenizer_path)
    return [tokenizer.decode(piece.tolist()) for piece in pieces if len(piece)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_split_is_the_rule_and_large_enough(sample_corpus: TokenCorpus) -> None:
    held = [d for d in sample_documents() if is_held_out(keyed_hash(d.text, SPLIT_KEY), HELD_OUT)]
    for language in ("en", "zh"):
        assert sorted(texts_of(sample_corpus, "validation", language)) == sorted(
            d.text for d in held if d.language == language
        )
        assert sum(d.num_bytes for d in held if d.language == language) >= 90_000


def test_tokens_in_the_folder_are_the_documents(sample_corpus: TokenCorpus) -> None:
    tokenizer = Tokenizer.load(sample_corpus.tokenizer_path)
    for language in sample_corpus.languages:
        expected = [d.text for d in sample_documents() if d.language == language]
        found = []
        for split in ("train", "validation"):
            source = sample_corpus.split(split).source(language)
            tokens = source.tokens(0, source.num_tokens)
            starts = np.flatnonzero(source.document_starts(0, source.num_tokens))
            pieces = np.split(tokens, starts[1:])
            assert all(p[0] == tokenizer.bos_id and p[-1] == tokenizer.eos_id for p in pieces)
            texts = [tokenizer.decode(piece.tolist()) for piece in pieces]
            assert source.text_bytes == sum(len(text.encode()) for text in texts)
            assert texts != [text for text in expected if text in set(texts)]
            found += texts
        assert sorted(found) == sorted(expected)
    sample_corpus.verify()


def test_baselines_are_those_of_xz(sample_corpus: TokenCorpus) -> None:
    assert set(sample_corpus.manifest.validation) == {"en", "zh"}
    for language, baseline in sample_corpus.manifest.validation.items():
        text = "".join(texts_of(sample_corpus, "validation", language)).encode()
        packed = subprocess.run([sys.executable, "-c", XZ], input=text, capture_output=True, check=True).stdout
        assert baseline.xz_bits_per_byte == len(packed) * 8 / len(text)
        assert 1 < baseline.xz_primed_bits_per_byte < baseline.xz_bits_per_byte < 4


XZ = "import sys, lzma; sys.stdout.buffer.write(lzma.compress(sys.stdin.buffer.read(), preset=9))"


def test_large_texts_have_no_baseline(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {path.stem: sum(d.num_bytes for d in documents_of(path)) for path in small_sources}
    monkeypatch.setattr("data.prepare.baselines.MOST_TEXT", max(sizes.values()))
    corpus = TokenCorpus.open(prepare(small_sources, TOKENIZER, tmp_path / "out"))
    assert list(corpus.manifest.validation) == [min(sizes, key=lambda name: sizes[name])]


def test_priming_counts_only_what_the_text_adds() -> None:
    text = os.urandom(4000)
    assert xz_primed_bits_per_byte(text, text) < 1
    assert 8 < xz_bits_per_byte(text) < 8.2
    assert round(xz_bits_per_byte(text) * 500) == len(lzma.compress(text, preset=9))


def test_the_seed_orders_documents_and_files_do_not(small_sources: list[Path], tmp_path: Path) -> None:
    first, other = (
        TokenCorpus.open(prepare(small_sources, TOKENIZER, tmp_path / f"seed{seed}", seed=seed)) for seed in (0, 1)
    )
    backwards = prepare(small_sources[::-1], TOKENIZER, tmp_path / "reversed")
    assert contents(backwards) == contents(first.folder)
    assert other.digest != first.digest
    assert sorted(texts_of(other, "train", "zh")) == sorted(texts_of(first, "train", "zh"))
    lines = small_sources[0].read_bytes().splitlines(keepends=True)
    (tmp_path / small_sources[0].name).write_bytes(b"".join(reversed(lines)))
    shuffled = prepare([tmp_path / small_sources[0].name, small_sources[1]], TOKENIZER, tmp_path / "shuffled")
    assert TokenCorpus.open(shuffled).digest == first.digest


@pytest.mark.parametrize("seed", [0, 7])
def test_units_and_workers_change_nothing(
    seed: int, small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(small_sources, TOKENIZER, tmp_path / "whole", seed=seed)
    monkeypatch.setattr("data.prepare.plan.UNIT_BYTES", 3000)
    monkeypatch.setattr("data.prepare.encode.BATCH_DOCUMENTS", 3)
    cut = prepare(small_sources, TOKENIZER, tmp_path / "cut", seed=seed)
    assert contents(cut) == contents(whole)
    if seed == 0:
        parallel = prepare(small_sources, TOKENIZER, tmp_path / "parallel", seed=seed, workers=3)
        assert contents(parallel) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_one_file_for_many_workers(small_sources: list[Path], tmp_path: Path) -> None:
    alone = prepare(small_sources[:1], TOKENIZER, tmp_path / "alone")
    assert contents(prepare(small_sources[:1], TOKENIZER, tmp_path / "eight", workers=8)) == contents(alone)


def test_large_vocabularies_get_wide_ids(small_sources: list[Path], tmp_path: Path) -> None:
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {f"unused{number}" * 3: number for number in range(8192, 70_000)}
    (tmp_path / "wide.json").write_text(json.dumps(content), encoding="utf-8")
    wide = TokenCorpus.open(prepare(small_sources, tmp_path / "wide.json", tmp_path / "wide"))
    plain = TokenCorpus.open(prepare(small_sources, TOKENIZER, tmp_path / "plain"))
    assert (wide.manifest.dtype, plain.manifest.dtype) == ("uint32", "uint16")
    assert np.array_equal(*(c.split("train").source("zh").tokens(0, 500) for c in (wide, plain)))


def test_duplicates_go_wherever_they_are(tmp_path: Path) -> None:
    texts = numbered(30)
    sources = [rows(tmp_path / "a.jsonl", texts[:20] * 2), rows(tmp_path / "b.jsonl", [*texts[10:], texts[29]])]
    corpus = TokenCorpus.open(prepare(sources, TOKENIZER, tmp_path / "out"))
    records = corpus.manifest.sources
    assert {name: (record.documents, record.duplicates) for name, record in records.items()} == {
        "a": (20, 20),
        "b": (10, 11),
    }
    found = [text for split in ("train", "validation") for name in "ab" for text in texts_of(corpus, split, name)]
    assert sorted(found) == sorted(texts)
    everything = prepare(sources, TOKENIZER, tmp_path / "all", selection=Selection(dedup=False))
    kept = TokenCorpus.open(everything)
    assert [kept.manifest.sources[name].documents for name in "ab"] == [40, 21]
    sides = {
        split: {text for name in "ab" for text in texts_of(kept, split, name)} for split in ("train", "validation")
    }
    assert sides["train"].isdisjoint(sides["validation"])
    assert all(kept.split("validation").source(name).num_documents for name in "ab")


def test_a_source_has_documents_on_either_side(tmp_path: Path) -> None:
    for count in (1, 2, 3, 5):
        source = rows(tmp_path / "few.jsonl", numbered(count))
        for held_out in (Fraction(1, 10**9), Fraction(999_999, 10**6)):
            out = tmp_path / f"{count}-{held_out.numerator}"
            corpus = TokenCorpus.open(prepare([source], TOKENIZER, out, selection=Selection(held_out=held_out)))
            sizes = [corpus.split(split).source("few").num_documents for split in ("train", "validation")]
            assert sum(sizes) == count
            assert sizes[0] >= 1
            assert sizes[1] >= (count > 1)
    none = prepare([source], TOKENIZER, tmp_path / "none", selection=Selection(held_out=Fraction(0)))
    assert TokenCorpus.open(none).split("validation").source("few").num_documents == 0


def test_two_columns_of_a_file_are_two_sources(tmp_path: Path) -> None:
    pairs = [{"en": f"English number {number}", "zh": f"第{number}句中文"} for number in range(150)]
    pairs[99]["zh"] = " "
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sources = [SourceSpec(name, str(path), language=name, text_field=name, weight=0.5) for name in ("en", "zh")]
    corpus = TokenCorpus.open(prepare(sources, TOKENIZER, tmp_path / "out"))
    for name, expected in (("en", 150), ("zh", 149)):
        found = texts_of(corpus, "train", name) + texts_of(corpus, "validation", name)
        assert sorted(found) == sorted(pair[name] for pair in pairs if pair[name].strip())
        assert corpus.manifest.sources[name].documents == expected
    (bad,) = (json.loads(line) for line in (corpus.folder / "quarantine.jsonl").read_text().splitlines())
    assert (bad["row"], bad["source"]) == (100, "zh")


def test_bad_rows_are_listed(tmp_path: Path) -> None:
    lines = rows(tmp_path / "a.jsonl", numbered(200)).read_text().splitlines(keepends=True)
    lines[16] = "broken\n"
    lines[149] = '{"text": "", "lang": "en"}\n'
    (tmp_path / "a.jsonl").write_text("".join(lines))
    out = prepare([tmp_path / "a.jsonl"], TOKENIZER, tmp_path / "out")
    found = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in found] == [
        (17, "not JSON"),
        (150, "`text` must be a string that is not empty"),
    ]
    assert found[0]["file"] == str(tmp_path / "a.jsonl")
    assert found[0]["source"] == "a"
    assert TokenCorpus.open(out).manifest.sources["a"].quarantined == 2
    strict = Selection(max_bad_rows=0.009)
    with pytest.raises(DataError, match=r"a.jsonl:17: not JSON; source a has 2 bad rows of 200, allowed: 0.009"):
        prepare([tmp_path / "a.jsonl"], TOKENIZER, tmp_path / "strict", selection=strict)


def test_rows_are_numbered_within_their_file_in_any_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    for name in ("1.jsonl", "2.jsonl"):
        lines = rows(folder / name, [f"{name} {text}" for text in numbered(60)]).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join([*lines[:50], "broken\n", *lines[50:]]))
    (folder / "3.jsonl.gz").write_bytes(gzip.compress((folder / "2.jsonl").read_bytes().replace(b"2.jsonl", b"3")))
    source = SourceSpec("part", str(folder))
    lists = []
    for limit in (200, 1 << 20):
        monkeypatch.setattr("data.prepare.plan.UNIT_BYTES", limit)
        out = prepare([source], TOKENIZER, tmp_path / str(limit), selection=Selection(max_bad_rows=0.5))
        lists.append([json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()])
    assert lists[0] == lists[1]
    assert [entry["row"] for entry in lists[0]] == [51] * 3
    assert contents(tmp_path / "200") == contents(tmp_path / str(1 << 20))


def test_short_long_and_foreign_documents_are_left_out(tmp_path: Path) -> None:
    texts = ["short", *numbered(20), "long " * 100, "学而时习之，不亦说乎，有朋自远方来", "12345 67890 12345 67890"]
    filters = Filters(min_chars=10, max_chars=100, check_language=True)
    out = prepare([rows(tmp_path / "a.jsonl", texts)], TOKENIZER, tmp_path / "out", filters=filters)
    record = TokenCorpus.open(out).manifest.sources["a"]
    assert record.filtered == {"another script": 2, "too long": 1, "too short": 1}
    assert record.documents == 20
    assert json.loads((out / "manifest.json").read_text())["sources"]["a"]["filtered"]["too long"] == 1
    for language, reason in {"xx": "no script is known for xx", "ru": "no documents are left"}.items():
        with pytest.raises(DataError, match=reason):
            prepare([rows(tmp_path / "a.jsonl", texts, language)], TOKENIZER, tmp_path / language, filters=filters)


def test_refusals(small_sources: list[Path], tmp_path: Path) -> None:
    en = small_sources[0]
    empty, bad, blank, mixed = (tmp_path / f"{name}.jsonl" for name in ("empty", "bad", "blank", "mixed"))
    empty.write_bytes(b"")
    bad.write_text('{"text": "one", "lang": "fr"}\n{"text": ""}\n', encoding="utf-8")
    blank.write_text('{"text": " ", "lang": "fr"}\n' * 3, encoding="utf-8")
    mixed.write_text('{"text": "one", "lang": "fr"}\n{"text": "zwei", "lang": "de"}\n', encoding="utf-8")
    copy = rows(tmp_path / "zz.jsonl", [d.text for d in documents_of(en)])
    cases: dict[str, list[Path | SourceSpec]] = {
        "no sources given": [],
        "source empty: .*empty.jsonl: is empty": [en, empty],
        "source en: is given 2 times": [en, en],
        "en.jsonl: belongs to sources en and other, give it once": [en, SourceSpec("other", str(en))],
        "bad.jsonl:2: `text` must be .* 1 bad rows of 2, allowed: 0.01": [en, bad],
        "blank.jsonl:1: `text` must be .* 3 bad rows of 3": [blank],
        "none.jsonl: no such file": [tmp_path / "none.jsonl"],
        "source mixed: has rows of de, fr": [mixed],
        "source zz: .* no documents are left": [en, copy],
        "text files do not say their language": [SourceSpec("text", str(en), format="text")],
    }
    before = sorted(tmp_path.iterdir())
    for reason, sources in cases.items():
        with pytest.raises(DataError, match=reason):
            prepare(sources, TOKENIZER, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "link").symlink_to("nowhere")
    for there in (tmp_path, tmp_path / "link"):
        with pytest.raises(DataError, match="exists already"):
            prepare([en], TOKENIZER, there)
    with pytest.raises(DataError, match="workers: 0 is too small"):
        prepare([en], TOKENIZER, tmp_path / "out", workers=0)
    all_bad = Selection(max_bad_rows=1)
    with pytest.raises(DataError, match=r"blank.jsonl:1: .* 3 bad rows of 3"):
        prepare([blank], TOKENIZER, tmp_path / "out", selection=all_bad)


def test_settings_out_of_range() -> None:
    for settings in ({"seed": -1}, {"held_out": Fraction(1)}, {"max_bad_rows": 1.5}, {"shard_tokens": 0}):
        (name,) = settings
        with pytest.raises(DataError, match=f"{name}: "):
            Selection(**settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="min_chars: -1"):
        Filters(min_chars=-1)
    with pytest.raises(DataError, match="max_chars: 3 leaves nothing"):
        Filters(min_chars=5, max_chars=3)


def test_a_full_disk_leaves_nothing(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("data.files._sync", full)
    assert command(monkeypatch, small_sources, tmp_path / "out") == 77
    assert capsys.readouterr().err.endswith("No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def command(monkeypatch: pytest.MonkeyPatch, sources: list[Path], out: Path, *more: str) -> int:
    named = [part for source in sources for part in ("--source", f"{source.stem}={source}")]
    monkeypatch.setattr(sys, "argv", ["prepare", *named, "--tokenizer", str(TOKENIZER), "--out", str(out), *more])
    return main()


def test_the_command_prints_facts(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(monkeypatch, small_sources, out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(out)
    assert facts["splits"]["train"]["zh"]["tokens"] == TokenCorpus.open(out).split("train").source("zh").num_tokens
    assert facts["sources"]["en"] == {"language": "en", "duplicates": 0, "filtered": {}, "quarantined": 0}
    assert command(monkeypatch, small_sources, out, "--json") == 77
    assert capsys.readouterr().err == f"error: {out}: exists already, choose another folder or remove it\n"
    assert command(monkeypatch, small_sources, tmp_path / "none", "--held-out", "much") == 77
    assert "--held-out: 'much' is no fraction" in capsys.readouterr().err


def test_the_command_takes_a_list_of_sources(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "sources.yaml"
    listed.write_text(f"books: {{path: {small_sources[0]}, language: en-gb}}\n")
    options = ("--sources", str(listed), "--min-chars", "290", "--held-out", "1/2", "--shard-tokens", "500")
    assert command(monkeypatch, small_sources[1:], tmp_path / "out", *options, "--quiet") == 0
    printed = capsys.readouterr()
    assert "too short" in printed.out
    assert printed.err == ""
    corpus = TokenCorpus.open(tmp_path / "out")
    assert corpus.language_of == {"books": "en-gb", "zh": "zh"}
    assert corpus.manifest.held_out == "1/2"
