from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    IGNORE_INDEX,
    DataError,
    Stage,
    StreamSpec,
    TokenCorpus,
    Tokenizer,
    TokenStream,
    validation_batches,
)
from data.prepare import prepare

EQUAL = {"en": 1, "zh": 1}


def open_stream(
    corpus: TokenCorpus, seq_len: int, weights: dict[str, object] = EQUAL, seed: int = 0, **settings: object
) -> TokenStream:
    return TokenStream(corpus, StreamSpec.single_stage(seq_len, weights, seed, **settings))  # type: ignore[arg-type]


def contents(stream: TokenStream, indices: object) -> list[tuple[object, ...]]:
    batch = stream.batch(indices)  # type: ignore[arg-type]
    columns = (batch.input_ids, batch.labels, batch.document_starts, batch.row_sources)
    return [tuple(column[row].tolist() for column in columns) for row in range(len(batch.row_sources))]  # type: ignore[misc]


def test_sequences_are_pure_and_labels_follow(sample_corpus: TokenCorpus) -> None:
    stream, again = (open_stream(sample_corpus, 256, seed=3) for _ in range(2))
    places = [0, 1, 17, 5000, 10**12]
    assert contents(stream, places) == contents(again, places[::-1])[::-1]
    assert contents(stream, places) == [contents(stream, [index])[0] for index in places]
    batch = stream.batch(places)
    for row, index in enumerate(places):
        place = stream.place(index)
        expected = sample_corpus.split("train").source(place.source).tokens(place.row * 256, place.row * 256 + 257)
        assert batch.input_ids[row].tolist() == expected[:-1].tolist()
        assert batch.labels[row].tolist() == expected[1:].tolist()
        assert sample_corpus.sources[batch.row_sources[row]] == place.source
        assert sample_corpus.languages[batch.row_languages[row]] == sample_corpus.language_of[place.source]
    assert batch.valid.all()
    assert batch.document_starts.equal(batch.input_ids == sample_corpus.bos_id)


@pytest.mark.parametrize("packing", ["chunk", "best_fit"])
@pytest.mark.parametrize("shuffle", ["windowed", "full"])
def test_every_row_comes_once_an_epoch(shuffle: str, packing: str, small_corpus: TokenCorpus) -> None:
    stream = open_stream(small_corpus, 32, {"en": 2, "zh": 1}, shuffle=shuffle, packing=packing)
    seen: dict[tuple[str, int], list[int]] = {}
    for index in range(9 * max(map(stream.num_rows, small_corpus.sources))):
        place = stream.place(index)
        seen.setdefault((place.source, place.epoch), []).append(place.row)
    for source in small_corpus.sources:
        rows = list(range(stream.num_rows(source)))
        assert sorted(seen[source, 0]) == sorted(seen[source, 1]) == rows
        assert seen[source, 0] != seen[source, 1]
        assert seen[source, 0] != rows


def test_the_last_row_may_end_with_the_last_token(small_corpus: TokenCorpus) -> None:
    source = small_corpus.split("train").source("en")
    whole = open_stream(small_corpus, source.num_tokens - 1, {"en": 1, "zh": 0})
    assert whole.num_rows("en") == 1
    assert whole.batch([0]).labels[0].tolist() == source.tokens(1, source.num_tokens).tolist()
    with pytest.raises(DataError, match="source en"):
        open_stream(small_corpus, source.num_tokens, {"en": 1, "zh": 0})


def test_the_seed_and_the_shuffle_change_the_order(small_corpus: TokenCorpus) -> None:
    streams = [
        open_stream(small_corpus, 8, seed=seed, shuffle=kind) for seed in (0, 1) for kind in ("windowed", "full")
    ]
    assert len({str(contents(stream, range(20))) for stream in streams}) == 4


def test_the_fingerprint_follows_what_decides_the_data(small_corpus: TokenCorpus, sample_corpus: TokenCorpus) -> None:
    prints = [
        open_stream(corpus, seq_len, weights, seed).fingerprint  # type: ignore[arg-type]
        for corpus, seq_len, weights, seed in (
            (small_corpus, 32, EQUAL, 0),
            (sample_corpus, 32, EQUAL, 0),
            (small_corpus, 33, EQUAL, 0),
            (small_corpus, 32, EQUAL, 1),
            (small_corpus, 32, {"en": 2, "zh": 1}, 0),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(bytes.fromhex(fingerprint)) == 24 for fingerprint in prints)
    assert open_stream(small_corpus, 32, {"zh": "0.5", "en": Fraction(1, 2)}).fingerprint == prints[0]


def test_best_fit_keeps_documents_whole_and_counts_its_padding(small_corpus: TokenCorpus) -> None:
    stream = open_stream(small_corpus, 200, packing="best_fit")
    batch = stream.batch(range(stream.num_rows("en") + stream.num_rows("zh")))
    padded = {name: [0, 0] for name in small_corpus.sources}
    for row in range(len(batch.input_ids)):
        pieces = stream.pieces(row)
        name = stream.place(row).source
        source = small_corpus.split("train").source(name)
        ends = source.document_ends().astype(int)
        padded[name][0] += int((~batch.valid[row]).sum())
        padded[name][1] += 200
        tokens = np.concatenate([piece.tokens for piece in pieces])
        assert batch.input_ids[row, : len(tokens)].tolist() == tokens.tolist()
        assert batch.valid[row].tolist() == [True] * len(tokens) + [False] * (200 - len(tokens))
        at = 0
        for piece in pieces:
            whole = ends[piece.document] - (ends[piece.document - 1] if piece.document else 0)
            assert len(piece.tokens) == whole or whole > 200
            assert batch.document_starts[row, at]
            assert batch.labels[row, at : at + len(piece.tokens) - 1].tolist() == piece.tokens[1:].tolist()
            at += len(piece.tokens)
            assert batch.labels[row, at - 1] == IGNORE_INDEX
    if all(share[1] == stream.num_rows(name) * 200 for name, share in padded.items()):
        assert stream.padding() == {name: lost / total for name, (lost, total) in padded.items()}
    assert 0 < max(stream.padding().values()) < 0.2


def test_pieces_are_the_documents_of_a_sequence(small_corpus: TokenCorpus) -> None:
    stream = open_stream(small_corpus, 32)
    batch = stream.batch(range(40))
    for index in range(40):
        pieces = stream.pieces(index)
        assert np.concatenate([piece.tokens for piece in pieces]).tolist() == batch.input_ids[index].tolist()
        opened = np.cumsum([0, *(len(piece.tokens) for piece in pieces)])[:-1][[piece.offset == 0 for piece in pieces]]
        assert batch.document_starts[index].nonzero().flatten().tolist() == opened.tolist()
        ends = small_corpus.split("train").source(stream.place(index).source).document_ends().astype(int)
        for piece in pieces:
            opens = ends[piece.document - 1] if piece.document else 0
            assert opens + piece.offset + len(piece.tokens) <= ends[piece.document]


def test_masked_documents_share_no_label(small_corpus: TokenCorpus) -> None:
    plain, masked = (open_stream(small_corpus, 64, mask_documents=mask) for mask in (False, True))
    one, other = (stream.batch(range(60)) for stream in (plain, masked))
    crossing = one.labels == small_corpus.bos_id
    assert crossing.any()
    assert other.labels[crossing].eq(IGNORE_INDEX).all()
    assert other.labels[~crossing].equal(one.labels[~crossing])
    assert other.input_ids.equal(one.input_ids)
    assert other.position_ids is not None
    assert other.position_ids[other.document_starts].eq(0).all()


def test_skipped_ranges_shift_what_follows(small_corpus: TokenCorpus) -> None:
    plain = open_stream(small_corpus, 32)
    skipping = open_stream(small_corpus, 32, skip_ranges=((3, 5), (9, 10)))
    kept = [0, 1, 2, 5, 6, 7, 8, 10, 11]
    assert contents(skipping, range(len(kept))) == contents(plain, kept)


def test_stages_change_the_mixture_where_they_start(small_corpus: TokenCorpus) -> None:
    stages = (Stage.of(0, {"en": 1, "zh": 0}), Stage.of(10, {"zh": 1}), Stage.of(30, {"en": "0.5", "zh": "0.5"}))
    stream = TokenStream(small_corpus, StreamSpec(32, stages))
    names = [stream.place(index).source for index in range(60)]
    assert names[:10] == ["en"] * 10
    assert names[10:30] == ["zh"] * 20
    assert Counter(names[30:]) == {"en": 15, "zh": 15}


def test_held_out_tokens_are_labels_once_and_bytes_add_up(sample_corpus: TokenCorpus) -> None:
    stream = open_stream(sample_corpus, 256)
    lengths = Tokenizer.load(TOKENIZER).byte_lengths()
    for name in sample_corpus.sources:
        source = sample_corpus.split("validation").source(name)
        batch = stream.validation_batch(name, 0, stream.num_validation_rows(name))
        real = batch.labels[batch.labels != IGNORE_INDEX].numpy()
        assert np.array_equal(real, source.tokens(1, source.num_tokens))
        assert lengths[real].sum() == source.text_bytes
        assert (batch.labels != IGNORE_INDEX).equal(batch.valid)
        assert np.array_equal(batch.input_ids[batch.valid], source.tokens(0, source.num_tokens - 1))
        assert 0 < int((~batch.valid[-1]).sum()) < 256
        assert batch.row_sources.unique().tolist() == [sample_corpus.sources.index(name)]


@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 1), (7, 1), (4, 2), (3, 8)])
def test_validation_batches_share_the_rows(batch_size: int, dp_size: int, small_corpus: TokenCorpus) -> None:
    stream = open_stream(small_corpus, 32)
    source = small_corpus.split("validation").source("en")
    ranks = [list(validation_batches(stream, "en", batch_size, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.input_ids.shape == (batch_size, 32) for batches in ranks for batch in batches)
    labels: Counter[int] = Counter()
    for batch in (batch for batches in ranks for batch in batches):
        labels.update(batch.labels[batch.valid].tolist())
        assert batch.num_labels() == batch.num_tokens() == int(batch.valid.sum())
    assert labels == Counter(source.tokens(1, source.num_tokens).tolist())


@pytest.mark.parametrize(
    ("seq_len", "weights", "settings", "reason"),
    [
        (0, EQUAL, {}, "seq_len: 0 is too small"),
        (10**6, EQUAL, {}, "source en: .* one sequence needs 1000001"),
        (32, {"en": 1}, {}, "weights: name en, the text has en, zh"),
        (32, {"en": 1, "zh": 1, "de": 1}, {}, "weights: name de, en, zh"),
        (32, {"en": 1, "zh": -1}, {}, "weights.zh: -1 is negative"),
        (32, EQUAL, {"shuffle": "none"}, "shuffle: 'none' is unknown"),
        (32, EQUAL, {"packing": "first_fit"}, "packing: 'first_fit' is unknown"),
        (32, EQUAL, {"skip_ranges": ((5, 5),)}, "skip_ranges: must be rising"),
        (32, EQUAL, {"skip_ranges": ((5, 9), (8, 11))}, "skip_ranges: must be rising"),
        (32, EQUAL, {"skip_ranges": ((-5, 9),)}, "skip_ranges: must be rising"),
    ],
)
def test_bad_settings(
    seq_len: int, weights: dict[str, object], settings: dict[str, object], reason: str, small_corpus: TokenCorpus
) -> None:
    with pytest.raises(DataError, match=reason):
        open_stream(small_corpus, seq_len, weights, **settings)


def test_indices_start_at_zero(small_corpus: TokenCorpus) -> None:
    with pytest.raises(IndexError):
        open_stream(small_corpus, 32).batch([3, -1])


def test_a_source_of_weight_zero_may_be_short(small_sources: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "de.jsonl"
    short.write_text(
        "".join(json.dumps({"text": text, "lang": "de"}) + "\n" for text in ("ein", "zwei", "drei")), encoding="utf-8"
    )
    corpus = TokenCorpus.open(prepare([*small_sources, short], TOKENIZER, tmp_path / "corpus"))
    stream = open_stream(corpus, 32, {"de": 0, "en": 1, "zh": 1})
    assert {stream.place(index).source for index in range(20)} == {"en", "zh"}
    assert stream.num_validation_rows("de") == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.sampled_from(["chunk", "best_fit"]), st.booleans(), st.integers(0, 2**40))
def test_any_setting_gives_whole_batches(
    small_corpus: TokenCorpus, seq_len: int, packing: str, mask: bool, first: int
) -> None:
    stream = open_stream(small_corpus, seq_len, packing=packing, mask_documents=mask)
    batch = stream.batch(range(first, first + 5))
    assert batch.input_ids.shape == (5, seq_len)
    assert batch.labels[~batch.valid].eq(IGNORE_INDEX).all()
    assert batch.input_ids.min() >= 0
    assert batch.input_ids.max() < small_corpus.vocab_size
