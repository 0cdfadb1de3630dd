from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from data import Batch, DataError, TokenCorpus, TokenStream, TrainLoader
from data.batch import Row

GLOBAL = 16


@pytest.fixture
def stream(small_corpus: TokenCorpus) -> TokenStream:
    return TokenStream(small_corpus, 32, {"en": "0.6", "zh": "0.4"}, seed=5)


def steps(loader: TrainLoader, count: int) -> list[torch.Tensor]:
    """Inputs, labels, languages and document starts of each step, as one tensor (4, sequences, L)."""
    with_fields = [[next(loader)] for _ in range(count)]
    return [torch.cat([fields(batch) for batch in batches], dim=1) for [batches] in with_fields]


def fields(batch: Batch) -> torch.Tensor:
    return torch.stack([batch.input_ids, batch.labels, batch.languages, batch.document_starts.long()])


@pytest.fixture
def straight(stream: TokenStream) -> Iterator[list[torch.Tensor]]:
    loader = TrainLoader(stream, GLOBAL, GLOBAL)
    yield steps(loader, 30)
    loader.close()


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 4), (2, 8), (4, 2), (8, 1), (8, 2), (16, 1)])
def test_global_batches_do_not_depend_on_the_layout(
    dp_size: int, micro: int, stream: TokenStream, straight: list[torch.Tensor]
) -> None:
    loaders = [TrainLoader(stream, GLOBAL, micro, rank, dp_size) for rank in range(dp_size)]
    for step in straight[:5]:
        parts = [next(loader) for loader in loaders]
        assert all(len(part) == GLOBAL // (dp_size * micro) for part in parts)
        assert all(batch.input_ids.shape == (micro, 32) for part in parts for batch in part)
        joined = torch.cat([fields(batch) for part in parts for batch in part], dim=1)
        assert torch.equal(joined, step)
    for loader in loaders:
        loader.close()


def test_steps_follow_the_stream(stream: TokenStream, straight: list[torch.Tensor]) -> None:
    for number, step in enumerate(straight):
        expected = fields(Batch.stack([stream[number * GLOBAL + i] for i in range(GLOBAL)]))
        assert torch.equal(step, expected)
    epochs = [stream[g].epoch for g in range(30 * GLOBAL)]
    assert max(epochs) >= 2


def test_resuming_three_times_is_exact(stream: TokenStream, straight: list[torch.Tensor]) -> None:
    """The stops fall in the middle of an epoch, right before the end of one, and right after it."""
    edge = next(g for g in range(30 * GLOBAL) if stream[g].epoch == 1) // GLOBAL
    stops = [0, 3, edge, edge + 1, 30]
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


def test_state_is_small_and_counts_what_was_returned(stream: TokenStream) -> None:
    loader = TrainLoader(stream, GLOBAL, 4, prefetch=5)
    next(loader)
    assert loader.state_dict() == {"consumed": GLOBAL, "fingerprint": stream.spec.fingerprint()}
    loader.load_state_dict({"consumed": 3 * 10**15, "fingerprint": stream.spec.fingerprint()})
    assert torch.equal(next(loader)[0].input_ids[0], torch.from_numpy(stream[3 * 10**15].input_ids))
    loader.close()


def test_another_stream_is_refused(stream: TokenStream, small_corpus: TokenCorpus) -> None:
    other = TokenStream(small_corpus, 32, {"en": 1, "zh": 1}, seed=5)
    loaders = [TrainLoader(one, GLOBAL, 4) for one in (stream, other)]
    with pytest.raises(DataError, match=r"corpus, seq_len, seed or weights have changed") as caught:
        loaders[0].load_state_dict(loaders[1].state_dict())
    assert stream.spec.fingerprint() in str(caught.value)
    assert other.spec.fingerprint() in str(caught.value)
    for consumed in (-1, "3", None):
        with pytest.raises(DataError, match="`consumed` must be"):
            loaders[0].load_state_dict({"consumed": consumed, "fingerprint": stream.spec.fingerprint()})  # type: ignore[dict-item]
    assert loaders[0].state_dict()["consumed"] == 0


def test_an_error_surfaces_and_no_step_is_lost(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = TrainLoader(stream, GLOBAL, 4)
    next(loader)
    loader.load_state_dict(loader.state_dict())
    read = TokenStream.__getitem__

    def broken(self: TokenStream, index: int) -> Row:
        if index == GLOBAL + 3:
            raise OSError("disk gone")
        return read(self, index)

    monkeypatch.setattr(TokenStream, "__getitem__", broken)
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(loader)
        assert loader.state_dict()["consumed"] == GLOBAL
    monkeypatch.setattr(TokenStream, "__getitem__", read)
    assert torch.equal(next(loader)[0].input_ids[0], torch.from_numpy(stream[GLOBAL].input_ids))
    loader.close()


def test_close_ends_the_thread(stream: TokenStream) -> None:
    before = threading.active_count()
    loader = TrainLoader(stream, GLOBAL, 4)
    next(loader)
    assert threading.active_count() == before + 1
    loader.close()
    assert threading.active_count() == before


def test_steps_are_prepared_ahead(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = threading.Event()
    read = TokenStream.__getitem__

    def watch(self: TokenStream, index: int) -> Row:
        if index == 3 * GLOBAL - 1:
            reached.set()
        return read(self, index)

    monkeypatch.setattr(TokenStream, "__getitem__", watch)
    loader = TrainLoader(stream, GLOBAL, 4, prefetch=2)
    next(loader)
    assert reached.wait(timeout=30)
    loader.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"global_batch_size": 10, "micro_batch_size": 4}, "global_batch_size: 10 is not a multiple of .* 1 x .* 4"),
        ({"global_batch_size": 8, "micro_batch_size": 4, "dp_size": 4}, "is not a multiple of"),
        ({"global_batch_size": 0, "micro_batch_size": 4}, "global_batch_size: 0 is too small"),
        ({"global_batch_size": 8, "micro_batch_size": 0}, "micro_batch_size: 0 is too small"),
        ({"global_batch_size": 8, "micro_batch_size": 4, "prefetch": 0}, "prefetch: 0 is too small"),
        ({"global_batch_size": 8, "micro_batch_size": 4, "dp_rank": 2, "dp_size": 2}, "dp_rank: 2 is outside 0 .. 1"),
    ],
)
def test_bad_settings(settings: dict[str, int], reason: str, stream: TokenStream) -> None:
    with pytest.raises(DataError, match=reason):
        TrainLoader(stream, **settings)


def test_batches_move_whole(stream: TokenStream) -> None:
    batch = Batch.stack([stream[0], stream[1]])
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in vars(moved).items()} == dict.fromkeys(vars(batch), (2, 32))
    kinds = {name: tensor.dtype for name, tensor in vars(batch).items()}
    assert kinds == dict.fromkeys(("input_ids", "labels", "languages", "label_languages"), torch.int64) | dict.fromkeys(
        ("valid", "document_starts"), torch.bool
    )
    assert batch.languages[:, 0].tolist() == [stream[0].language, stream[1].language]
