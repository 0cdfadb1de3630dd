"""Feed one data-parallel rank: its slice of every global batch, prepared ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from data.batch import Batch
from data.errors import DataError
from data.stream import TokenStream


class TrainLoader:
    """Endless optimizer steps: `next()` gives this rank's micro-batches of one step.

    Step s holds the sequences `s * global_batch_size ..`; rank r takes the r-th of `dp_size` equal runs of them, in
    order. The global batches are therefore the same for every `dp_size` and micro-batch size.

    Args:
        global_batch_size: sequences of one optimizer step over all ranks.
        micro_batch_size: sequences of one `Batch`.
        prefetch: steps prepared ahead.
        pin_memory: put batches into page-locked memory, from which copies to a GPU overlap with its work.

    Raises:
        DataError: a size below 1, or `global_batch_size` is not a multiple of `dp_size * micro_batch_size`.
    """

    def __init__(
        self,
        stream: TokenStream,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "prefetch": prefetch}
        _require_positive(**sizes, dp_size=dp_size)
        if not 0 <= dp_rank < dp_size:
            raise DataError(f"dp_rank: {dp_rank} is outside 0 .. {dp_size - 1}")
        if global_batch_size % (dp_size * micro_batch_size):
            raise DataError(
                f"global_batch_size: {global_batch_size} is not a multiple of "
                f"data-parallel size {dp_size} x micro_batch_size {micro_batch_size}"
            )
        self._stream = stream
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._share = global_batch_size // dp_size
        self._dp_rank = dp_rank
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._consumed = 0
        self._pending: deque[Future[list[Batch]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data-loader")

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """Micro-batches of the next step. An error of the thread is raised here; the step is not counted then."""
        while len(self._pending) <= self._prefetch:
            ahead = self._consumed + len(self._pending) * self._global_batch_size
            self._pending.append(self._thread.submit(self._step, ahead))
        try:
            batches = self._pending.popleft().result()
        except BaseException:
            self._drop_pending()
            raise
        self._consumed += self._global_batch_size
        return batches

    def state_dict(self) -> dict[str, int | str]:
        """Sequences returned so far over all ranks, and the fingerprint of the stream they came from."""
        return {"consumed": self._consumed, "fingerprint": self._stream.spec.fingerprint()}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue after `state`; costs nothing, whatever the position. Batch and data-parallel size may differ.

        Raises:
            DataError: the state is malformed or belongs to another stream.
        """
        consumed, fingerprint = state.get("consumed"), state.get("fingerprint")
        if not isinstance(consumed, int) or consumed < 0:
            raise DataError(f"data state: `consumed` must be an integer of 0 or more, found {consumed!r}")
        if fingerprint != (own := self._stream.spec.fingerprint()):
            raise DataError(
                f"data state: saved with fingerprint {fingerprint}, this run has {own}: "
                "the corpus, seq_len, seed or weights have changed"
            )
        self._drop_pending()
        self._consumed = consumed

    def close(self) -> None:
        """Stop the thread and wait for it; the loader is of no use afterwards."""
        self._drop_pending()
        self._thread.shutdown(wait=True)

    def _drop_pending(self) -> None:
        while self._pending:
            self._pending.pop().cancel()

    def _step(self, consumed: int) -> list[Batch]:
        first = consumed + self._dp_rank * self._share
        starts = range(first, first + self._share, self._micro_batch_size)
        batches = [Batch.stack([self._stream[start + i] for i in range(self._micro_batch_size)]) for start in starts]
        return [batch.pin_memory() for batch in batches] if self._pin_memory else batches


def validation_batches(
    stream: TokenStream, language: str, batch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of a language's held-out rows; all ranks get equally many batches, the last ones padded.

    Raises:
        DataError: a size below 1, or the language is not in the corpus.
    """
    _require_positive(batch_size=batch_size, dp_size=dp_size)
    stride = batch_size * dp_size
    for start in range(0, stream.num_validation_rows(language), stride):
        first = start + dp_rank * batch_size
        yield Batch.stack([stream.validation_row(language, row) for row in range(first, first + batch_size)])


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name}: {size} is too small, 1 is the least")
