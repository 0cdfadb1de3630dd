from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import TOKENIZER

from data import IGNORE_INDEX, DataError, TokenCorpus, Tokenizer, TokenStream, validation_batches
from data.batch import Row
from data.prepare import prepare

EQUAL = {"en": 1, "zh": 1}


def content(row: Row) -> tuple[object, ...]:
    return (row.input_ids.tobytes(), row.labels.tobytes(), row.document_starts.tobytes(), row.language, row.epoch)


def test_rows_are_pure_and_labels_follow(sample_corpus: TokenCorpus) -> None:
    stream, again = (TokenStream(sample_corpus, 256, EQUAL, seed=3) for _ in range(2))
    places = (0, 1, 17, 5000, 10**12)
    assert [content(stream[g]) for g in places] == [content(again[g]) for g in reversed(places)][::-1]
    for g in places:
        row = stream[g]
        source = sample_corpus.split("train").source(sample_corpus.languages[row.language])
        expected = source.tokens(row.source_row * 256, row.source_row * 256 + 257)
        assert np.array_equal(row.input_ids, expected[:-1])
        assert np.array_equal(row.labels, expected[1:])
        assert row.input_ids.dtype == row.labels.dtype == np.int64
        assert row.valid.all()
        assert np.array_equal(row.document_starts, row.input_ids == sample_corpus.bos_id)


def test_every_row_comes_once_an_epoch(small_corpus: TokenCorpus) -> None:
    stream = TokenStream(small_corpus, 32, {"en": 2, "zh": 1}, seed=0)
    seen: dict[tuple[int, int], list[int]] = {}
    for g in range(9 * max(map(stream.num_rows, small_corpus.languages))):
        row = stream[g]
        seen.setdefault((row.language, row.epoch), []).append(row.source_row)
    for language, name in enumerate(small_corpus.languages):
        rows = stream.num_rows(name)
        assert sorted(seen[language, 0]) == sorted(seen[language, 1]) == list(range(rows))
        assert seen[language, 0] != seen[language, 1]
        assert seen[language, 0] != list(range(rows))


def test_the_last_row_may_end_with_the_last_token(small_corpus: TokenCorpus) -> None:
    source = small_corpus.split("train").source("en")
    whole = TokenStream(small_corpus, source.num_tokens - 1, {"en": 1, "zh": 0}, seed=0)
    assert whole.num_rows("en") == 1
    assert np.array_equal(whole[0].labels, source.tokens(1, source.num_tokens))
    with pytest.raises(DataError, match="language en"):
        TokenStream(small_corpus, source.num_tokens, {"en": 1, "zh": 0}, seed=0)


def test_the_seed_changes_the_order(small_corpus: TokenCorpus) -> None:
    first, second = (TokenStream(small_corpus, 32, EQUAL, seed) for seed in (0, 1))
    assert [content(first[g]) for g in range(20)] != [content(second[g]) for g in range(20)]


def test_the_fingerprint_follows_what_decides_the_data(small_corpus: TokenCorpus, sample_corpus: TokenCorpus) -> None:
    prints = [
        TokenStream(corpus, seq_len, weights, seed).spec.fingerprint()
        for corpus, seq_len, weights, seed in (
            (small_corpus, 32, EQUAL, 0),
            (sample_corpus, 32, EQUAL, 0),
            (small_corpus, 33, EQUAL, 0),
            (small_corpus, 32, EQUAL, 1),
            (small_corpus, 32, {"en": 2, "zh": 1}, 0),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(bytes.fromhex(fingerprint)) == 16 for fingerprint in prints)
    same = TokenStream(small_corpus, 32, {"zh": "0.5", "en": Fraction(1, 2)}, 0).spec.fingerprint()
    assert same == prints[0]


def test_held_out_tokens_are_labels_once_and_bytes_add_up(sample_corpus: TokenCorpus) -> None:
    stream = TokenStream(sample_corpus, 256, EQUAL, seed=0)
    lengths = Tokenizer.load(TOKENIZER).byte_lengths()
    for language in sample_corpus.languages:
        source = sample_corpus.split("validation").source(language)
        rows = list(stream.validation_rows(language))
        labels = np.concatenate([row.labels for row in rows])
        real = labels[labels != IGNORE_INDEX]
        assert np.array_equal(real, source.tokens(1, source.num_tokens))
        assert lengths[real].sum() == source.text_bytes
        assert np.array_equal(labels != IGNORE_INDEX, np.concatenate([row.valid for row in rows]))
        inputs = np.concatenate([row.input_ids for row in rows])
        assert np.array_equal(inputs[: len(real)], source.tokens(0, source.num_tokens - 1))
        assert 0 < (~rows[-1].valid).sum() < 256
        assert {row.language for row in rows} == {sample_corpus.languages.index(language)}


@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 1), (7, 1), (4, 2), (3, 8)])
def test_validation_batches_share_the_rows(batch_size: int, dp_size: int, small_corpus: TokenCorpus) -> None:
    stream = TokenStream(small_corpus, 32, EQUAL, seed=0)
    source = small_corpus.split("validation").source("en")
    ranks = [list(validation_batches(stream, "en", batch_size, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.input_ids.shape == (batch_size, 32) for batches in ranks for batch in batches)
    labels: Counter[int] = Counter()
    for batch in (batch for batches in ranks for batch in batches):
        labels.update(batch.labels[batch.valid].tolist())
        assert int(batch.num_labels()) == int(batch.valid.sum())
    assert labels == Counter(source.tokens(1, source.num_tokens).tolist())


@pytest.mark.parametrize(
    ("seq_len", "weights", "reason"),
    [
        (0, EQUAL, "seq_len: 0 is too small"),
        (10**6, EQUAL, "language en: .* one sequence needs 1000001"),
        (32, {"en": 1}, "weights: name en, the corpus has en, zh"),
        (32, {}, "weights: name none, the corpus has en, zh"),
        (32, {"en": 1, "zh": 1, "de": 1}, "weights: name de, en, zh"),
        (32, {"en": 1, "zh": -1}, "weights.zh: -1 is negative"),
    ],
)
def test_bad_settings(seq_len: int, weights: dict[str, float], reason: str, small_corpus: TokenCorpus) -> None:
    with pytest.raises(DataError, match=reason):
        TokenStream(small_corpus, seq_len, weights, seed=0)


def test_indices_start_at_zero(small_corpus: TokenCorpus) -> None:
    with pytest.raises(IndexError):
        TokenStream(small_corpus, 32, EQUAL, seed=0)[-1]


def test_a_language_of_weight_zero_may_be_short(small_sources: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "de.jsonl"
    short.write_text(
        "".join(json.dumps({"text": text, "lang": "de"}) + "\n" for text in ("ein", "zwei", "drei")), encoding="utf-8"
    )
    corpus = TokenCorpus.open(prepare([*small_sources, short], TOKENIZER, tmp_path / "corpus"))
    stream = TokenStream(corpus, 32, {"de": 0, "en": 1, "zh": 1}, seed=0)
    assert {corpus.languages[stream[g].language] for g in range(20)} == {"en", "zh"}
    assert stream.num_validation_rows("de") == 1
