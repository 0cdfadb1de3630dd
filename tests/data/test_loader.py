from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from data import Batch, BatchSizes, DataError, Stage, StreamSpec, TokenCorpus, TokenStream, TrainLoader
from data.loader import READ_AT_ONCE
from data.spec import PARTS

GLOBAL = 16
WEIGHTS = {"en": "0.6", "zh": "0.4"}


@pytest.fixture
def stream(small_corpus: TokenCorpus) -> TokenStream:
    return TokenStream(small_corpus, StreamSpec.single_stage(32, WEIGHTS, seed=5))


def fields(batch: Batch) -> torch.Tensor:
    """Inputs, labels, languages, sources and document starts of a batch, (5, B, L)."""
    return torch.stack([batch.input_ids, batch.labels, batch.languages, batch.sources, batch.document_starts.long()])


def joined(batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([fields(batch) for batch in batches], dim=1)


def steps(loader: TrainLoader, count: int) -> list[torch.Tensor]:
    return [joined(next(loader)) for _ in range(count)]


@pytest.fixture
def straight(stream: TokenStream) -> Iterator[list[torch.Tensor]]:
    loader = TrainLoader(stream, GLOBAL, GLOBAL)
    yield steps(loader, 30)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 4), (2, 8), (4, 2), (8, 1), (16, 1)])
def test_global_batches_do_not_depend_on_layout_or_workers(
    dp_size: int, micro: int, workers: int, stream: TokenStream, straight: list[torch.Tensor]
) -> None:
    loaders = [TrainLoader(stream, GLOBAL, micro, rank, dp_size, workers=workers) for rank in range(dp_size)]
    for step in straight[:5]:
        parts = [next(loader) for loader in loaders]
        assert all(len(part) == GLOBAL // (dp_size * micro) for part in parts)
        assert all(batch.input_ids.shape == (micro, 32) for part in parts for batch in part)
        assert torch.equal(joined([batch for part in parts for batch in part]), step)
    for loader in loaders:
        loader.close()


def global_step(stream: TokenStream, size: int, ranks: int, state: dict[str, int | str]) -> tuple[bytes, dict]:  # type: ignore[type-arg]
    """One step read by `ranks` fresh loaders that resume from `state`; its bytes, and the state after it."""
    parts, states = [], []
    for rank in range(ranks):
        loader = TrainLoader(stream, size, size // ranks, rank, ranks, workers=0)
        loader.load_state_dict(state)
        parts += next(loader)
        states.append(loader.state_dict())
        loader.close()
    assert all(other == states[0] for other in states)
    return joined(parts).numpy().tobytes(), states[0]


def test_ordered_batches_are_the_same_on_1_to_256_ranks(stream: TokenStream) -> None:
    start = {"consumed": 0, "fingerprint": stream.fingerprint}
    reference, after = global_step(stream, 256, 1, start)
    for ranks in (2, 16, 256):
        assert global_step(stream, 256, ranks, start) == (reference, after)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_1_to_256_ranks_with_any_workers_read_the_same_steps(workers: int, stream: TokenStream) -> None:
    size, count = 256, 12
    wanted = [fields(stream.batch(range(first, first + size))) for first in range(0, count * size, size)]
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        parts = []
        for rank in range(ranks):
            loader = TrainLoader(stream, size, size // ranks, rank, ranks, workers=workers)
            parts.append(steps(loader, count))
            loader.close()
        for number, step in enumerate(wanted):
            assert torch.equal(torch.cat([part[number] for part in parts], dim=1), step)


def test_ranks_may_change_in_the_middle_of_a_run(stream: TokenStream) -> None:
    runs = []
    for schedule in ([1] * 12, [1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 1, 1]):
        state, seen = {"consumed": 0, "fingerprint": stream.fingerprint}, []
        for ranks in schedule:
            content, state = global_step(stream, GLOBAL, ranks, state)
            seen.append(content)
        runs.append(seen)
    assert runs[0] == runs[1]


def test_steps_follow_the_stream(stream: TokenStream, straight: list[torch.Tensor]) -> None:
    for number, step in enumerate(straight):
        assert torch.equal(step, fields(stream.batch(range(number * GLOBAL, (number + 1) * GLOBAL))))
    assert max(stream.place(index).epoch for index in range(30 * GLOBAL)) >= 2


def test_resuming_is_exact_in_the_middle_and_at_the_edges_of_epochs(
    stream: TokenStream, straight: list[torch.Tensor]
) -> None:
    edge = next(index for index in range(30 * GLOBAL) if stream.place(index).epoch == 1) // GLOBAL
    stops = [0, 3, edge, edge + 1, 20, 30]
    assert stops == sorted(set(stops))
    seen: list[torch.Tensor] = []
    state = None
    for begin, end in zip(stops, stops[1:], strict=False):
        loader = TrainLoader(stream, GLOBAL, 4)
        if state:
            loader.load_state_dict(state)
        seen += steps(loader, end - begin)
        state = loader.state_dict()
        assert state["consumed"] == end * GLOBAL
        loader.close()
    assert all(torch.equal(a, b) for a, b in zip(seen, straight, strict=True))


def test_resume_five_times_in_a_row_at_the_edges_of_stages(small_corpus: TokenCorpus) -> None:
    edges = (5 * GLOBAL, 8 * GLOBAL + 3)  # between two steps and within one
    weights = (WEIGHTS, {"en": 1, "zh": 9}, {"zh": 1})
    stages = tuple(Stage.of(start, shares) for start, shares in zip((0, *edges), weights, strict=True))
    stream = TokenStream(small_corpus, StreamSpec(32, stages, seed=5))
    seen: list[torch.Tensor] = []
    state: dict[str, int | str] = {"consumed": 0, "fingerprint": stream.fingerprint}
    for count in (4, 1, 1, 2, 1, 4):
        loader = TrainLoader(stream, GLOBAL, 4)
        loader.load_state_dict(json.loads(json.dumps(state)))
        seen += steps(loader, count)
        state = loader.state_dict()
        loader.close()
    assert torch.equal(torch.cat(seen, dim=1), fields(stream.batch(range(13 * GLOBAL))))
    names = [stream.place(index).source for index in range(13 * GLOBAL)]
    shares = [names[:80].count("zh"), names[80:131].count("zh"), names[131:].count("zh")]
    assert shares == [32, 46, 77]


def test_resuming_costs_the_same_at_any_position(stream: TokenStream) -> None:
    costs = []
    for position in (10**3, 10**6, 10**9):
        loader = TrainLoader(stream, GLOBAL, GLOBAL, workers=0)
        calls: list[str] = []
        sys.setprofile(lambda frame, event, argument, calls=calls: calls.append(event))  # type: ignore[misc]
        loader.load_state_dict({"consumed": position, "fingerprint": stream.fingerprint})
        next(loader)
        sys.setprofile(None)
        costs.append(len(calls))
        loader.close()
    assert max(costs) < 1.2 * min(costs)


def test_every_row_once_an_epoch_under_100_interruptions(small_corpus: TokenCorpus) -> None:
    stream = TokenStream(small_corpus, StreamSpec.single_stage(16, WEIGHTS, seed=5))
    chance = random.Random(0)
    seen: list[tuple[int, ...]] = []
    state, interruptions, size = None, 0, 2
    while interruptions < 100 or len(seen) < 2 * (stream.num_rows("en") + stream.num_rows("zh")):
        loader = TrainLoader(stream, size, size, workers=chance.choice([0, 1, 2]), prefetch=chance.choice([1, 3]))
        if state is not None:
            loader.load_state_dict(state)
        for _ in range(chance.randint(0, 6)):
            seen += [tuple(row) for batch in next(loader) for row in batch.input_ids.tolist()]
        state = json.loads(json.dumps(loader.state_dict()))
        interruptions += 1
        loader.close()
    places = [stream.place(index) for index in range(len(seen))]
    assert len(set(places)) == len(places)
    for source in ("en", "zh"):
        first_epoch = [place.row for place in places if place.source == source and place.epoch == 0]
        assert sorted(first_epoch) == list(range(stream.num_rows(source)))
    expected = stream.batch(range(len(seen))).input_ids.tolist()
    assert seen == [tuple(row) for row in expected]


def test_resuming_with_another_layout_and_batch_size(stream: TokenStream, straight: list[torch.Tensor]) -> None:
    first = TrainLoader(stream, GLOBAL, 4)
    steps(first, 2)
    second = TrainLoader(stream, GLOBAL // 2, 2)
    second.load_state_dict(first.state_dict())
    halves = steps(second, 2)
    assert torch.equal(torch.cat(halves, dim=1), straight[2])
    first.close()
    second.close()


def test_loading_a_state_drops_what_was_prefetched(stream: TokenStream, straight: list[torch.Tensor]) -> None:
    loader = TrainLoader(stream, GLOBAL, 4, prefetch=3)
    start = loader.state_dict()
    steps(loader, 4)
    loader.load_state_dict(start)
    assert torch.equal(steps(loader, 1)[0], straight[0])
    loader.close()


def test_state_counts_what_was_returned_and_takes_100_bytes_at_most(stream: TokenStream) -> None:
    loader = TrainLoader(stream, GLOBAL, 4, prefetch=5)
    next(loader)
    assert loader.state_dict() == {"consumed": GLOBAL, "fingerprint": stream.fingerprint}
    far = 3 * 10**15
    loader.load_state_dict({"consumed": far, "fingerprint": stream.fingerprint})
    assert len(json.dumps(loader.state_dict())) <= 100
    assert torch.equal(next(loader)[0].input_ids, stream.batch(range(far, far + 4)).input_ids)
    loader.close()


CHANGES = {
    "seq_len": {"seq_len": 33},
    "seed": {"seed": 6},
    "weights": {"stages": (Stage.of(0, {"en": 1, "zh": 1}),)},
    "shuffle": {"shuffle": "full"},
    "packing": {"packing": "best_fit"},
    "mask_documents": {"mask_documents": True},
    "skip_ranges": {"skip_ranges": ((3, 9),)},
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_changed_stream_is_refused_with_what_changed_unless_accepted(part: str, small_corpus: TokenCorpus) -> None:
    settings = {"seq_len": 32, "stages": (Stage.of(0, WEIGHTS),), "seed": 5}
    one, other = (TokenStream(small_corpus, StreamSpec(**(settings | change))) for change in ({}, CHANGES[part]))  # type: ignore[arg-type]
    loaders = [TrainLoader(stream, GLOBAL, 4, workers=0) for stream in (one, other)]
    next(loaders[0])
    state = loaders[0].state_dict()
    with pytest.raises(DataError, match=rf"^data state: {part} changed since it was saved") as caught:
        loaders[1].load_state_dict(state)
    assert not any(name in str(caught.value).partition(" changed")[0] for name in PARTS if name != part)
    assert loaders[1].state_dict()["consumed"] == 0
    loaders[1].load_state_dict(state, accept_change=True)
    assert loaders[1].state_dict() == {"consumed": GLOBAL, "fingerprint": other.fingerprint}


@pytest.mark.parametrize("consumed", [-1, "3", None, True, 1.5, 1 << 70])
def test_a_malformed_state_is_refused(consumed: object, stream: TokenStream) -> None:
    loader = TrainLoader(stream, GLOBAL, 4)
    with pytest.raises(DataError, match="`consumed` must be"):
        loader.load_state_dict({"consumed": consumed, "fingerprint": stream.fingerprint})
    for fingerprint in (None, 7, "abc"):
        with pytest.raises(DataError, match="text, seq_len, seed"):
            loader.load_state_dict({"consumed": 0, "fingerprint": fingerprint})
    loader.close()


def test_an_error_surfaces_and_no_step_is_lost(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = TrainLoader(stream, GLOBAL, 4)
    next(loader)
    loader.load_state_dict(loader.state_dict())
    read = TokenStream.batches

    def broken(self: TokenStream, indices: np.ndarray, size: int) -> list[Batch]:
        if GLOBAL + 3 in indices:
            raise OSError("disk gone")
        return read(self, indices, size)

    monkeypatch.setattr(TokenStream, "batches", broken)
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(loader)
        assert loader.state_dict()["consumed"] == GLOBAL
    monkeypatch.setattr(TokenStream, "batches", read)
    assert torch.equal(next(loader)[0].input_ids[0], stream.batch([GLOBAL]).input_ids[0])
    loader.close()


def test_close_ends_the_threads(stream: TokenStream) -> None:
    before = threading.active_count()
    loader = TrainLoader(stream, GLOBAL, 4, workers=3)
    next(loader)
    assert before < threading.active_count() <= before + 3
    loader.close()
    assert threading.active_count() == before


def test_steps_are_prepared_ahead(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = threading.Event()
    read = TokenStream.batches

    def watch(self: TokenStream, indices: np.ndarray, size: int) -> list[Batch]:
        if 3 * READ_AT_ONCE - 1 in indices:
            reached.set()
        return read(self, indices, size)

    monkeypatch.setattr(TokenStream, "batches", watch)
    loader = TrainLoader(stream, GLOBAL, 4, prefetch=2)
    next(loader)
    assert reached.wait(timeout=30)
    loader.close()


def test_a_batch_ramp_counts_its_sequences(stream: TokenStream) -> None:
    sizes = BatchSizes(16, [(2, 4), (5, 8)])
    assert [sizes.first_sequence(step) for step in range(8)] == [0, 4, 8, 16, 24, 32, 48, 64]
    assert [sizes.size_at(sizes.first_sequence(step)) for step in range(8)] == [4, 4, 8, 8, 8, 16, 16, 16]
    loader = TrainLoader(stream, sizes, 2, 1, 2, prefetch=3)
    for step in range(7):
        first = sizes.first_sequence(step)
        share = sizes.size_at(first) // 2
        assert torch.equal(joined(next(loader)), fields(stream.batch(range(first + share, first + 2 * share))))
    state = loader.state_dict()
    assert state["consumed"] == sizes.first_sequence(7)
    resumed = TrainLoader(stream, sizes, 2, 1, 2)
    resumed.load_state_dict(state)
    assert torch.equal(joined(next(resumed)), joined(next(loader)))
    loader.close()
    resumed.close()


@pytest.mark.parametrize(
    ("ramp", "reason"),
    [([(0, 4)], "must rise"), ([(3, 4), (3, 8)], "must rise"), ([(3, 0)], "a size is below 1")],
)
def test_bad_ramps(ramp: list[tuple[int, int]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        BatchSizes(16, ramp)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sizes": 10, "micro_batch_size": 4}, "global_batch_size: 10 is not a multiple of .* 1 x .* 4"),
        ({"sizes": 8, "micro_batch_size": 4, "dp_size": 4}, "is not a multiple of"),
        ({"sizes": 0, "micro_batch_size": 4}, "a size is below 1"),
        ({"sizes": 8, "micro_batch_size": 0}, "micro_batch_size: 0 is too small"),
        ({"sizes": 8, "micro_batch_size": 4, "prefetch": 0}, "prefetch: 0 is too small"),
        ({"sizes": 8, "micro_batch_size": 4, "workers": -1}, "workers: -1 is too small"),
        ({"sizes": 8, "micro_batch_size": 4, "dp_rank": 2, "dp_size": 2}, "dp_rank: 2 is outside 0 .. 1"),
    ],
)
def test_bad_settings(settings: dict[str, int], reason: str, stream: TokenStream) -> None:
    with pytest.raises(DataError, match=reason):
        TrainLoader(stream, **settings)


def test_batches_move_whole(stream: TokenStream) -> None:
    batch = stream.batch([0, 1])
    moved = batch.to("meta")
    kept = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
    assert {moved_tensor.device.type for moved_tensor in vars(moved).values() if moved_tensor is not None} == {"meta"}
    assert {name: getattr(moved, name).shape for name in kept} == {name: tensor.shape for name, tensor in kept.items()}
    assert moved.languages.shape == moved.sources.shape == (2, 32)
