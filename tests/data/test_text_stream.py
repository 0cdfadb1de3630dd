"""Text tokenised while training: the order of its sequences, whoever serves them, however often it is interrupted."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from data import Batch, BatchSizes, DataError, Mixture, Stage, StreamSpec, Tokenizer
from data.order import permute
from data.sources import SourceSpec
from data.split import SPLIT_KEY, is_held_out, keyed_hash
from data.text.corpus import TextCorpus
from data.text.cursor import merge_states, pack_cursors, unpack_cursors
from data.text.loader import TextLoader
from data.text.reader import Reader
from data.text.stream import TextStream
from tests.data.conftest import TOKENIZER

WEIGHTS = {"en": "0.7", "zh": "0.3"}
SEQ_LEN = 48
STREAMS = 16


def texts(name: str, count: int, seed: int = 1) -> list[str]:
    words = {"en": ["the", "model", "reads", "a", "river", "stone"], "zh": ["学而", "时习之", "不亦", "说乎"]}[name]
    dice = random.Random(f"{name}{seed}")
    return [f"{name} {number} " + " ".join(dice.choices(words, k=dice.randint(1, 60))) for number in range(count)]


def write_jsonl(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "en.jsonl", texts("en", 400))
    pq.write_table(pa.table({"text": texts("zh", 300)}), folder / "zh.parquet", row_group_size=128)
    return folder


def open_corpus(folder: Path, streams: int = STREAMS, **settings: Any) -> TextCorpus:
    sources = [
        SourceSpec("en", str(folder / "en.jsonl"), language="en"),
        SourceSpec("zh", str(folder / "zh.parquet"), language="zh"),
    ]
    return TextCorpus.open(sources, TOKENIZER, streams=streams, cache_dir=folder / "cache", **settings)


@pytest.fixture(scope="module")
def corpus(folder: Path) -> TextCorpus:
    return open_corpus(folder)


@pytest.fixture(scope="module")
def stream(corpus: TextCorpus) -> TextStream:
    return TextStream(corpus, StreamSpec.single_stage(SEQ_LEN, WEIGHTS, seed=5))


def rows(batches: Sequence[Batch]) -> np.ndarray:
    """Tokens, labels, starts and sources of every sequence, (B, 3 L + 1)."""
    parts = [
        np.concatenate(
            [batch.input_ids, batch.labels, batch.document_starts.long(), batch.row_sources[:, None]], axis=1
        )
        for batch in batches
    ]
    return np.concatenate(parts)


def global_steps(loaders: Sequence[TextLoader], count: int) -> list[bytes]:
    """Global batches put back in order: a turn holds one sequence of every stream."""
    steps = []
    for _ in range(count):
        parts = [rows(next(loader)) for loader in loaders]
        own = STREAMS // len(loaders)
        turns = [part.reshape(-1, own, part.shape[1]) for part in parts]
        steps.append(hashlib.sha256(np.concatenate(turns, axis=1).tobytes()).digest())
    return steps


def run(
    stream: TextStream,
    dp_size: int,
    count: int,
    *,
    state: dict[str, Any] | None = None,
    workers: int = 0,
    prefetch: int = 2,
    micro: int = 1,
    size: int | BatchSizes = STREAMS,
) -> tuple[list[bytes], dict[str, Any]]:
    """`count` global steps by `dp_size` fresh loaders that go on from `state`, and the state after them."""
    loaders = [
        TextLoader(stream, size, micro, rank, dp_size, workers=workers, prefetch=prefetch) for rank in range(dp_size)
    ]
    try:
        for loader in loaders if state else ():
            loader.load_state_dict(json.loads(json.dumps(state)))
        steps = global_steps(loaders, count)
        return steps, merge_states([loader.state_dict() for loader in reversed(loaders)])
    finally:
        for loader in loaders:
            loader.close()


@pytest.fixture(scope="module")
def straight(stream: TextStream) -> list[bytes]:
    return run(stream, 1, 60)[0]


@pytest.mark.parametrize(("dp_size", "micro"), [(2, 8), (4, 2), (8, 1), (16, 1)])
def test_global_batches_do_not_depend_on_the_ranks(
    dp_size: int, micro: int, stream: TextStream, straight: list[bytes]
) -> None:
    assert run(stream, dp_size, 8, micro=micro, prefetch=1)[0] == straight[:8]


@pytest.mark.parametrize(("workers", "dp_size"), [(4, 1), (2, 2)])
def test_global_batches_do_not_depend_on_the_workers(
    workers: int, dp_size: int, stream: TextStream, straight: list[bytes]
) -> None:
    steps, state = run(stream, dp_size, 5, workers=workers)
    assert steps == straight[:5]
    assert run(stream, 1, 5, state=state)[0] == straight[5:10]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("dp_size", [1, 2, 4, 8, 16])
def test_as_many_ranks_as_streams_with_any_workers_read_the_same_steps(
    dp_size: int, workers: int, stream: TextStream, straight: list[bytes]
) -> None:
    parts = []
    for rank in range(dp_size):
        loader = TextLoader(stream, STREAMS, 1, rank, dp_size, workers=workers)
        parts.append([rows(next(loader)) for _ in range(12)])
        loader.close()
    steps = [np.concatenate([part[number] for part in parts]).tobytes() for number in range(12)]
    assert [hashlib.sha256(step).digest() for step in steps] == straight[:12]


def test_ranks_may_change_while_training(stream: TextStream, straight: list[bytes]) -> None:
    state, steps = None, []
    for dp_size in (1, 2, 4, 8, 2, 1):
        more, state = run(stream, dp_size, 3, state=state)
        steps += more
    assert steps == straight[:18]


def test_batch_sizes_may_grow(stream: TextStream, straight: list[bytes]) -> None:
    sizes = BatchSizes(2 * STREAMS, [(3, STREAMS)])
    steps, state = run(stream, 2, 4, size=sizes)
    assert steps[:3] == straight[:3]
    assert state["consumed"] == 5 * STREAMS
    assert run(stream, 1, 2, state=state)[0] == straight[5:7]


@pytest.fixture
def tiny(tmp_path: Path) -> TextCorpus:
    """60 documents in 2 streams; a turn is about as long as a document."""
    write_jsonl(tmp_path / "en.jsonl", texts("en", 60))
    source = SourceSpec("en", str(tmp_path / "en.jsonl"), language="en")
    return TextCorpus.open([source], TOKENIZER, streams=2, cache_dir=tmp_path / "cache")


def documents_of(batches: Sequence[tuple[np.ndarray, np.ndarray]], corpus: TextCorpus) -> list[str]:
    """Whole documents in the inputs (n, L) of one stream's sequences, laid end to end."""
    tokens = np.concatenate([inputs.ravel() for inputs, _ in batches])
    starts = np.concatenate([starts.ravel() for _, starts in batches])
    bounds = np.flatnonzero(starts)
    assert np.all(tokens[bounds] == corpus.bos_id)
    assert np.all(tokens[bounds[1:] - 1] == corpus.eos_id)
    return [corpus.tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(bounds, bounds[1:], strict=False)]


def test_every_document_once_an_epoch_under_many_interruptions(tiny: TextCorpus) -> None:
    stream = TextStream(tiny, StreamSpec.single_stage(31, {"en": 1}, seed=3))
    dice = random.Random(0)
    seen: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    state: dict[str, Any] = {}
    for _ in range(100):
        loader = TextLoader(stream, 2, 2, workers=0, prefetch=dice.randint(1, 3))
        if state:
            loader.load_state_dict(state)
        for _ in range(dice.randint(0, 4)):
            (batch,) = next(loader)
            for place in range(2):
                seen[place].append((batch.input_ids[place].numpy(), batch.document_starts[place].numpy()))
        state = loader.state_dict()
        loader.close()
    wanted = sorted(text for text in texts("en", 60) if not is_held_out(keyed_hash(text, SPLIT_KEY)))
    assert len(wanted) < 60
    passes = [[one_pass(tiny, stream.spec.seed, place, epoch) for epoch in range(2)] for place in range(2)]
    for epoch in range(2):
        assert sorted(passes[0][epoch] + passes[1][epoch]) == wanted
    for part, (first, second) in zip(seen, passes, strict=True):
        documents = documents_of(part, tiny)
        assert first != second
        assert documents[: len(first) + len(second)] == first + second


def one_pass(corpus: TextCorpus, seed: int, stream: int, epoch: int) -> list[str]:
    """Documents that a stream reads in one pass, from the units dealt to it."""
    key = f"text/{seed}/en"
    units = permute(np.arange(len(corpus.plan.units[0])), *aligned(corpus.plan.units[0], key, epoch))[
        stream :: corpus.streams
    ]
    reader = Reader(corpus)
    found = []
    for number in units.tolist():
        unit = reader.texts(0, number)
        order = permute(np.arange(len(unit)), *aligned(unit, key, epoch, number))
        found += [unit[row] for row in order.tolist()]
    return [text for text in found if text is not None]


def aligned(items: Any, *key: object) -> tuple[np.ndarray, np.ndarray]:
    name = "/".join(map(str, key))
    return np.array(len(items)), np.array(xxhash.xxh3_64_intdigest(name.encode()), np.uint64)


def test_resume_five_times_across_the_ends_of_epochs(tiny: TextCorpus) -> None:
    stream = TextStream(tiny, StreamSpec.single_stage(64, {"en": 1}, seed=3))

    def two(count: int, state: dict[str, Any] | None) -> tuple[list[bytes], dict[str, Any]]:
        loader = TextLoader(stream, 2, 1, workers=0)
        if state:
            loader.load_state_dict(state)
        steps = [rows(next(loader)).tobytes() for _ in range(count)]
        state = loader.state_dict()
        loader.close()
        return steps, state

    whole, _ = two(90, None)
    steps, state = two(15, None)
    for _ in range(5):
        more, state = two(15, state)
        steps += more
    assert steps == whole
    assert unpack_cursors(state["cursors"], 2, 1)[:, 0, 0].min() >= 2


def test_resume_five_times_in_a_row_at_the_edges_of_stages(corpus: TextCorpus) -> None:
    edges = (0, 5 * STREAMS, 8 * STREAMS + 3)  # between two steps and within one
    weights = (WEIGHTS, {"en": 1, "zh": 9}, {"zh": 1})
    stages = tuple(Stage.of(start, shares) for start, shares in zip(edges, weights, strict=True))
    staged = TextStream(corpus, StreamSpec(SEQ_LEN, stages, seed=5))
    steps, state = run(staged, 1, 4)
    for count in (1, 1, 2, 1, 4):
        more, state = run(staged, 2, count, state=state)
        steps += more
    assert steps == run(staged, 1, 13)[0]


def test_resuming_costs_the_same_at_any_position(stream: TextStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    texts_of = Reader.texts

    def count(self: Reader, source: int, number: int) -> Any:
        read.append(number)
        return texts_of(self, source, number)

    monkeypatch.setattr(Reader, "texts", count)
    loader = TextLoader(stream, STREAMS, STREAMS, workers=0, prefetch=1)
    state = loader.state_dict()
    costs = []
    for position, epoch in ((10**3, 10), (10**6, 10**4), (10**9, 10**7)):
        far = np.tile((epoch, 1, 2, 3), (STREAMS, 2, 1))
        consumed = position // STREAMS * STREAMS
        loader.load_state_dict(state | {"consumed": consumed, "cursors": pack_cursors(far)})
        read.clear()
        next(loader)
        loader.close()
        costs.append(len(read))
    assert max(costs) <= 8 * STREAMS  # some steps are read ahead


def test_state_holds_what_was_returned_not_what_was_read_ahead(stream: TextStream, straight: list[bytes]) -> None:
    loader = TextLoader(stream, STREAMS, STREAMS, workers=0, prefetch=5)
    assert global_steps([loader], 3) == straight[:3]
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert global_steps([loader], 2) == straight[3:5]
    loader.close()
    assert global_steps([loader], 1) == straight[5:6]
    loader.close()


def test_mixture_is_exact(stream: TextStream) -> None:
    loader = TextLoader(stream, STREAMS, STREAMS, workers=0)
    drawn = np.concatenate([next(loader)[0].row_sources for _ in range(20)])
    loader.close()
    wanted = Mixture([Stage.of(0, WEIGHTS)]).locate(np.arange(20 * STREAMS))[0]
    assert np.array_equal(drawn, wanted)


def test_state_is_small(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "en.jsonl", texts("en", 4000))
    pq.write_table(pa.table({"text": texts("zh", 4000)}), tmp_path / "zh.parquet")
    corpus = open_corpus(tmp_path, 64)
    stream = TextStream(corpus, StreamSpec.single_stage(SEQ_LEN, WEIGHTS))
    loader = TextLoader(stream, 64, 64, workers=0)
    for _ in range(30):
        next(loader)
    state = loader.state_dict()
    loader.close()
    assert len(json.dumps(state)) < 2048
    far = np.full((64, 2, 4), (90, 60_000, 1000, 30_000))
    assert len(json.dumps(state | {"cursors": pack_cursors(far)})) <= 4096
    assert np.array_equal(unpack_cursors(pack_cursors(far), 64, 2), far)


def test_skipped_sequences_are_read_past(stream: TextStream, corpus: TextCorpus) -> None:
    spec = StreamSpec.single_stage(SEQ_LEN, WEIGHTS, seed=5, skip_ranges=((5, 7), (16, 48), (64, 65)))
    skipping = TextStream(corpus, spec)

    def by_stream(stream: TextStream, turns: int) -> list[list[bytes]]:
        loader = TextLoader(stream, STREAMS, STREAMS, workers=0)
        out = np.stack([rows(next(loader)) for _ in range(turns)])
        loader.close()
        return [[out[turn, place].tobytes() for turn in range(turns)] for place in range(STREAMS)]

    whole, kept = by_stream(stream, 9), by_stream(skipping, 5)
    for place in range(STREAMS):
        left = [whole[place][turn] for turn in range(9) if not _is_skipped(turn * STREAMS + place, spec)]
        assert kept[place] == left[:5]
    loader = TextLoader(skipping, STREAMS, STREAMS, workers=0)
    next(loader)
    state = loader.state_dict()
    loader.load_state_dict(state)
    again = rows(next(loader))
    loader.close()
    assert [again[place].tobytes() for place in range(STREAMS)] == [part[1] for part in kept]


def _is_skipped(index: int, spec: StreamSpec) -> bool:
    return any(first <= index < end for first, end in spec.skip_ranges)


def test_held_out_documents_are_validated_on_and_never_trained_on(stream: TextStream, corpus: TextCorpus) -> None:
    for name in corpus.sources:
        wanted = [
            text for text in texts(name, 400 if name == "en" else 300) if is_held_out(keyed_hash(text, SPLIT_KEY))
        ]
        held = corpus.split("validation").source(name)
        assert wanted
        assert corpus.tokenizer.decode(held.tokens(0, held.num_tokens).tolist()) == "".join(wanted)
        assert held.text_bytes == sum(len(text.encode()) for text in wanted)
        count = stream.num_validation_rows(name)
        batch = stream.validation_batch(name, 0, count + 1)
        assert int(batch.valid.sum()) == held.num_tokens - 1
        assert not batch.valid[-1].any()
    loader = TextLoader(stream, STREAMS, STREAMS, workers=0)
    batches = [next(loader)[0] for _ in range(150)]
    loader.close()
    for place, name in enumerate(corpus.sources):
        trained: set[str] = set()
        for number in range(STREAMS):
            own = [batch for batch in batches if batch.row_sources[number] == place]
            inputs = [(batch.input_ids[number].numpy(), batch.document_starts[number].numpy()) for batch in own]
            trained |= set(documents_of(inputs, corpus))
        everything = set(texts(name, 400 if name == "en" else 300))
        allowed = {text for text in everything if not is_held_out(keyed_hash(text, SPLIT_KEY))}
        assert trained <= allowed
        assert len(trained) > 0.7 * len(allowed)


def test_validation_stops_at_its_number_of_tokens(folder: Path, corpus: TextCorpus) -> None:
    few = open_corpus(folder, validation_tokens=100).split("validation").source("en")
    whole = corpus.split("validation").source("en")
    assert 100 <= few.num_tokens < whole.num_tokens
    assert few.num_tokens == whole.document_ends()[few.num_documents - 1]
    assert open_corpus(folder, validation_tokens=0).split("validation").source("zh").num_tokens == 0
    assert open_corpus(folder, held_out=Fraction(0)).split("validation").source("zh").num_tokens == 0


def test_the_plan_and_the_held_out_documents_are_kept(folder: Path, corpus: TextCorpus) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.suffix != ".lock"}
    again = open_corpus(folder)
    assert again.digest == corpus.digest
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert open_corpus(folder, streams=8).digest != corpus.digest
    (path,) = (folder / "cache").glob(f"{corpus.plan.folder.name}/plan.json")
    path.write_text("{")
    assert open_corpus(folder).digest == corpus.digest


def test_a_cache_on_read_only_storage_is_read(
    folder: Path, corpus: TextCorpus, make_read_only: Callable[[], None]
) -> None:
    make_read_only()
    assert open_corpus(folder).digest == corpus.digest
    with pytest.raises(OSError, match="Read-only"):
        open_corpus(folder, streams=4)


def test_open_files_do_not_grow(stream: TextStream) -> None:
    loader = TextLoader(stream, STREAMS, STREAMS, workers=0)
    for _ in range(5):
        next(loader)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        next(loader)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # one may be open just now
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_nobody_closes_ends_before_the_interpreter(
    stream: TextStream, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    next(TextLoader(stream, STREAMS, STREAMS, workers=workers))
    assert "text-loader" in {thread.name for thread in threading.enumerate()}
    for end in at_exit:
        end()
    assert not {thread.name for thread in threading.enumerate()} & {"text-loader", "data worker 0", "data worker 1"}


def test_a_state_must_fit(stream: TextStream, folder: Path) -> None:
    _, state = run(stream, 1, 1)
    loader = TextLoader(stream, STREAMS, 1, workers=0)
    half = TextLoader(stream, STREAMS, 1, 0, 2, workers=0).state_dict()
    bad = {
        "data.streams=16": half,
        "`consumed`": state | {"consumed": -1},
        "weights": state
        | {"fingerprint": TextStream(stream.text, _spec(seed=5, weights={"en": 1, "zh": 1})).fingerprint},
        "seed": state | {"fingerprint": TextStream(stream.text, _spec(seed=6)).fingerprint},
        "cursors": state | {"cursors": state["cursors"][:-8]},
        "not a multiple": state | {"consumed": 3},
        "`sources`": state | {"sources": None},
    }
    for reason, wrong in bad.items():
        with pytest.raises(DataError, match=reason):
            loader.load_state_dict(wrong)
    other = TextStream(stream.text, _spec(seed=6))
    TextLoader(other, STREAMS, 1, workers=0).load_state_dict(state, accept_change=True)
    states = [TextLoader(stream, STREAMS, 1, rank, 2, workers=0).state_dict() for rank in range(2)]
    with pytest.raises(DataError, match="not of one moment"):
        merge_states(states[1:])
    with pytest.raises(DataError, match="not of one moment"):
        merge_states([states[0], states[1] | {"consumed": 16}])


def test_a_new_source_begins_where_the_others_go_on(stream: TextStream, folder: Path) -> None:
    source = SourceSpec("en", str(folder / "en.jsonl"), language="en")
    alone = TextCorpus.open([source], TOKENIZER, streams=STREAMS, cache_dir=folder / "cache")
    _, state = run(TextStream(alone, StreamSpec.single_stage(SEQ_LEN, {"en": 1})), 2, 3)
    loader = TextLoader(stream, STREAMS, 1, 1, 2, workers=0)
    with pytest.raises(DataError, match="text, seed, weights changed"):
        loader.load_state_dict(state)
    loader.load_state_dict(state, accept_change=True)
    cursors = unpack_cursors(loader.state_dict()["cursors"], STREAMS // 2, 2)
    assert np.array_equal(cursors[:, 0], unpack_cursors(state["cursors"], STREAMS, 1)[STREAMS // 2 :, 0])
    assert not cursors[:, 1].any()
    next(loader)
    loader.close()


def _spec(seed: int, weights: dict[str, Any] | None = None) -> StreamSpec:
    return StreamSpec.single_stage(SEQ_LEN, weights or WEIGHTS, seed=seed)


def test_settings_that_cannot_be(stream: TextStream, corpus: TextCorpus, folder: Path) -> None:
    with pytest.raises(DataError, match="best_fit needs all"):
        TextStream(corpus, StreamSpec.single_stage(SEQ_LEN, WEIGHTS, packing="best_fit"))
    with pytest.raises(DataError, match="weights: name en, the text has en, zh"):
        TextStream(corpus, StreamSpec.single_stage(SEQ_LEN, {"en": 1}))
    with pytest.raises(DataError, match=r"data.streams: 16 is not a multiple of the data-parallel size 3"):
        TextLoader(stream, 48, 1, 0, 3)
    with pytest.raises(DataError, match=r"8 is not a multiple of data.streams=16; 8 would fit"):
        TextLoader(stream, 8, 1)
    with pytest.raises(DataError, match=r"source en: has \d+ units .* set data.streams to"):
        open_corpus(folder, streams=1024)


def test_sample_is_training_text(corpus: TextCorpus) -> None:
    ids = corpus.sample("zh", 500)
    assert ids.shape == (500,)
    (first, *_) = [text for text in texts("zh", 300) if not is_held_out(keyed_hash(text, SPLIT_KEY))]
    assert Tokenizer.load(TOKENIZER).decode(ids.tolist()).startswith(first[:20])


@pytest.fixture(autouse=True)
def no_processes_left() -> Iterator[None]:
    yield
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children if Path(f"/proc/{child}").exists()]
    assert not [command for command in commands if b"data.text.worker" in command]
