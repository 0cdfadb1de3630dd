from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, TokenCorpus
from data.files import file_digest
from data.manifest import Manifest
from data.prepare import Selection, prepare

Damage = Callable[[Callable[[Path], object]], Path]


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Damage that rewrites the manifest."""

    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return damage


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


REFUSED_ON_OPENING: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: no such file"),
    "manifest is not JSON": (write("manifest.json", b"{"), "not JSON"),
    "manifest is not UTF-8": (write("manifest.json", b"\xff\x00\x81"), "not JSON"),
    "manifest is a list": (write("manifest.json", b"[]"), "not a JSON object"),
    "manifest is deep": (write("manifest.json", b"[" * 100_000), "not JSON"),
    "later format": (manifest(lambda content: content.update(format_version=3)), "format_version is 3"),
    "earlier format": (
        manifest(lambda content: content.update(format_version=1)),
        "format_version is 1.*prepare it again",
    ),
    "no format": (manifest(lambda content: content.pop("format_version")), "format_version is None"),
    "no shards": (manifest(lambda content: content.pop("shards")), "`shards` must be a list"),
    "empty shards": (
        manifest(lambda content: content.update(shards=[])),
        "train shards of en must be",
    ),
    "lost shard": (manifest(lambda content: content["shards"].pop(0)), "train shards of en must be numbered"),
    "doubled shard": (manifest(lambda content: content["shards"].append(content["shards"][0])), "must be numbered"),
    "misnumbered shard": (manifest(lambda content: content["shards"][0].update(number=1)), "must be numbered"),
    "no sources": (manifest(lambda content: content.update(sources={})), "unknown split or source"),
    "nothing": (manifest(lambda content: content.update(sources={}, shards=[], validation={})), "names no sources"),
    "sources are a list": (manifest(lambda content: content.update(sources=[])), "`sources` must be a dict"),
    "path as source": (
        manifest(lambda content: content["sources"].update({"../x": content["sources"]["en"]})),
        "bad source name",
    ),
    "path as language": (manifest(lambda content: content["sources"]["en"].update(language="../x")), "bad source name"),
    "text for filtered": (
        manifest(lambda content: content["sources"]["en"].update(filtered={"a": "b"})),
        "must be a int",
    ),
    "file without size": (manifest(lambda content: content["sources"]["en"]["files"][0].pop("size")), "`size` must be"),
    "bad fraction": (manifest(lambda content: content.update(held_out="1/0")), "held_out '1/0' is no fraction"),
    "large fraction": (manifest(lambda content: content.update(held_out="1")), "held_out 1 is out of range"),
    "shard is text": (manifest(lambda content: content.update(shards=["a"])), "list of objects"),
    "text for tokens": (manifest(lambda content: content["shards"][0].update(tokens="9")), "`tokens` must be a int"),
    "flag for tokens": (manifest(lambda content: content["shards"][0].update(tokens=True)), "`tokens` must be a int"),
    "no tokens": (manifest(lambda content: content["shards"][0].update(tokens=0)), "count below 1"),
    "more tokens": (manifest(lambda content: content["shards"][0].update(tokens=10**15)), "the manifest says"),
    "shard of no source": (manifest(lambda content: content["shards"][0].update(source="../x")), "unknown split or"),
    "unknown split": (manifest(lambda content: content["shards"][0].update(split="test")), "unknown split or"),
    "signed ids": (manifest(lambda content: content.update(dtype="int16")), "allowed: uint16, uint32"),
    "object ids": (manifest(lambda content: content.update(dtype="O")), "allowed: uint16, uint32"),
    "wider ids": (manifest(lambda content: content.update(dtype="uint32")), "the manifest says"),
    "negative vocabulary": (manifest(lambda content: content.update(vocab_size=-1)), "out of range"),
    "baseline of no language": (
        manifest(lambda content: content["validation"].update(de=content["validation"]["en"])),
        "may name the languages en, zh only",
    ),
    "baseline is a number": (manifest(lambda content: content["validation"].update(en=3)), "must map names to objects"),
    "cut tokens": (cut("train-en-00000.bin"), "the manifest says"),
    "cut index": (cut("validation-zh-00000.idx"), "the manifest says"),
    "empty tokens": (write("train-zh-00000.bin", b""), "has 0 bytes"),
    "missing tokens": (lambda folder: (folder / "train-zh-00000.bin").unlink(), "is missing"),
    "missing index": (lambda folder: (folder / "train-zh-00000.idx").unlink(), "is missing"),
    "missing tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
    "other tokenizer": (cut("tokenizer.json"), "tokenizer.json: content does not match"),
}


@pytest.mark.parametrize("case", REFUSED_ON_OPENING)
def test_a_damaged_folder_is_refused(case: str, damaged: Damage) -> None:
    change, reason = REFUSED_ON_OPENING[case]
    folder = damaged(change)
    with pytest.raises(DataError, match=reason) as caught:
        TokenCorpus.open(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def rewrite(name: str, dtype: str, change: Callable[[np.ndarray], object], honest: bool) -> Callable[[Path], object]:
    """Damage the numbers in a file; `honest` corrects the digest in the manifest, as a faulty writer would."""

    def damage(folder: Path) -> None:
        values = np.fromfile(folder / name, dtype)
        change(values)
        values.tofile(folder / name)
        if honest:
            key = "tokens_xxh3" if name.endswith("bin") else "index_xxh3"
            manifest(lambda content: content["shards"][0].update({key: file_digest(folder / name)}))(folder)

    return damage


REFUSED_BY_VERIFY = {
    "flipped id": (rewrite("train-zh-00000.bin", "<u2", lambda ids: ids.__setitem__(7, ids[7] ^ 1), False), "match"),
    "id too large": (rewrite("train-en-00000.bin", "<u2", lambda ids: ids.__setitem__(7, 8192), True), "token id 8192"),
    "no BOS": (rewrite("train-en-00000.bin", "<u2", lambda ids: ids.__setitem__(0, 99), True), "from BOS to EOS"),
    "no EOS": (rewrite("train-en-00000.bin", "<u2", lambda ids: ids.__setitem__(-1, 99), True), "from BOS to EOS"),
    "index swaps": (
        rewrite("train-en-00000.idx", "<u8", lambda ends: ends[:2].__setitem__(slice(None), ends[1::-1]), True),
        "do not increase",
    ),
    "index overflows": (
        rewrite("train-en-00000.idx", "<u8", lambda ends: ends.__setitem__(0, 1 << 63), True),
        "do not increase",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_VERIFY)
def test_verify_finds_bad_content(case: str, damaged: Damage) -> None:
    change, reason = REFUSED_BY_VERIFY[case]
    corpus = TokenCorpus.open(damaged(change))
    with pytest.raises(DataError, match=reason):
        corpus.verify()


def test_index_that_ends_elsewhere_is_refused(damaged: Damage) -> None:
    change = rewrite("train-en-00000.idx", "<u8", lambda ends: ends.__setitem__(-1, ends[-1] + 1), True)
    with pytest.raises(DataError, match="last document ends at"):
        TokenCorpus.open(damaged(change))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such corpus folder"):
        TokenCorpus.open(tmp_path / "none")


def test_document_starts_come_from_the_index(small_corpus: TokenCorpus) -> None:
    source = small_corpus.split("train").source("zh")
    tokens = source.tokens(0, source.num_tokens)
    starts = source.document_starts(0, source.num_tokens)
    assert starts.sum() == source.num_documents
    assert np.array_equal(starts, tokens == small_corpus.bos_id)
    second = int(np.flatnonzero(starts)[1])
    for begin, end in ((0, 0), (0, 1), (1, second), (second, second + 1), (second - 1, second + 40), (3, 3)):
        assert np.array_equal(source.document_starts(begin, end), starts[begin:end])
        assert np.array_equal(source.tokens(begin, end), tokens[begin:end])


def test_positions_outside_are_refused(small_corpus: TokenCorpus) -> None:
    source = small_corpus.split("train").source("en")
    for begin, end in ((-1, 3), (5, 4), (0, source.num_tokens + 1)):
        with pytest.raises(IndexError):
            source.tokens(begin, end)
        with pytest.raises(IndexError):
            source.document_starts(begin, end)


def test_unknown_names_are_refused(small_corpus: TokenCorpus) -> None:
    with pytest.raises(DataError, match="it has train, validation"):
        small_corpus.split("test")
    with pytest.raises(DataError, match="it has en, zh"):
        small_corpus.split("train").source("de")


def test_the_digest_follows_content_alone(small_corpus: TokenCorpus, damaged: Damage) -> None:
    renamed = TokenCorpus.open(damaged(manifest(lambda content: content["sources"]["en"]["files"][0].update(name="x"))))
    assert renamed.digest == small_corpus.digest
    assert isinstance(renamed.manifest, Manifest)
    assert renamed.manifest != small_corpus.manifest
    relabelled = manifest(lambda content: content["sources"]["en"].update(language="fr"))
    relabelled(renamed.folder)
    manifest(lambda content: content.update(validation={}))(renamed.folder)
    assert TokenCorpus.open(renamed.folder).digest != small_corpus.digest


@pytest.fixture(scope="module")
def cut_corpus(small_sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    """The small corpus in shards of at most 300 tokens."""
    out = tmp_path_factory.mktemp("cut") / "corpus"
    return TokenCorpus.open(prepare(small_sources, TOKENIZER, out, selection=Selection(shard_tokens=300)))


def test_shards_read_as_one(small_corpus: TokenCorpus, cut_corpus: TokenCorpus) -> None:
    shards = [shard for shard in cut_corpus.manifest.shards if shard.split == "train"]
    assert len(shards) > 8
    assert all(shard.tokens <= 300 or shard.documents == 1 for shard in shards)
    for name in small_corpus.sources:
        whole, cut = (corpus.split("train").source(name) for corpus in (small_corpus, cut_corpus))
        size = whole.num_tokens
        assert (cut.num_tokens, cut.num_documents, cut.text_bytes) == (size, whole.num_documents, whole.text_bytes)
        assert np.array_equal(cut.document_ends(), whole.document_ends())
        assert cut.document_ends().dtype == np.uint64
        for begin, end in ((0, size), (299, 301), (0, 0), (size, size), (150, 1000), (size - 1, size)):
            assert np.array_equal(cut.tokens(begin, end), whole.tokens(begin, end))
            assert np.array_equal(cut.document_starts(begin, end), whole.document_starts(begin, end))
    cut_corpus.verify()


@given(data=st.data(), length=st.integers(1, 700))
def test_rows_are_slices(cut_corpus: TokenCorpus, data: st.DataObject, length: int) -> None:
    source = cut_corpus.split("train").source("en")
    begins = np.array(data.draw(st.lists(st.integers(0, source.num_tokens - length), max_size=4)), dtype=np.int64)
    rows = np.arange(len(begins))[::-1] + 1
    tokens, starts = np.full((len(begins) + 2, length), 7), np.zeros((len(begins) + 2, length), dtype=np.bool_)
    source.fill_rows(begins, rows, tokens, starts)
    for row, begin in zip(rows.tolist(), begins.tolist(), strict=True):
        assert np.array_equal(tokens[row], source.tokens(begin, begin + length))
        assert np.array_equal(starts[row], source.document_starts(begin, begin + length))
    assert np.all(tokens[[0, -1]] == 7)
    beyond = np.array([source.num_tokens - length + 1])
    for outside in (beyond, -1 - beyond):
        with pytest.raises(IndexError):
            source.fill_rows(outside, np.array([0]), tokens, starts)


def test_a_source_without_validation_is_empty(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "only one", "lang": "fr"}\n')
    corpus = TokenCorpus.open(prepare([tmp_path / "one.jsonl"], TOKENIZER, tmp_path / "out"))
    source = corpus.split("validation").source("one")
    assert (source.num_tokens, source.num_documents, source.text_bytes) == (0, 0, 0)
    assert len(source.tokens(0, 0)) == len(source.document_ends()) == 0
    with pytest.raises(IndexError):
        source.tokens(0, 1)
    assert corpus.manifest.validation == {}
    assert "one" not in corpus.stats()["splits"]["validation"]  # type: ignore[index]
    corpus.verify()
