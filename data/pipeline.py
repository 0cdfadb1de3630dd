"""From the `data` section of a configuration to what a run reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from data.corpus import TokenCorpus
from data.errors import DataError
from data.loader import BatchSizes, TrainLoader
from data.order import Stage
from data.prepare import prepare_cached
from data.sources import SourceSpec
from data.spec import StreamSpec
from data.stream import Stream, Text, require_sources
from data.text.corpus import TextCorpus
from data.text.cursor import merge_states
from data.text.loader import TextLoader
from data.text.stream import TextStream
from data.token_stream import TokenStream

Loader = TrainLoader | TextLoader


def open_text(data: Mapping[str, Any]) -> Text:
    """The text that the configuration names: a prepared folder, sources prepared on first use, or sources to stream.

    Raises:
        DataError: any of it cannot be used; the line names the file or key.
    """
    if data["mode"] == "tokens" and data["prepared"] is not None:
        return TokenCorpus.open(data["prepared"])
    sources = source_specs(data["sources"])
    if data["mode"] == "tokens":
        return TokenCorpus.open(prepare_cached(sources, data["tokenizer"], data["cache_dir"]))
    return TextCorpus.open(
        sources,
        data["tokenizer"],
        streams=data["streams"],
        validation_tokens=data["validation_tokens"],
        cache_dir=data["cache_dir"],
    )


def source_specs(sources: Mapping[str, Mapping[str, Any]]) -> list[SourceSpec]:
    """The sources of a configuration, by name."""
    return [
        SourceSpec(name=name, **{key: value for key, value in entry.items() if key != "weight"})
        for name, entry in sorted(sources.items())
    ]


def stream_spec(data: Mapping[str, Any], text: Text, sizes: BatchSizes, seed: int) -> StreamSpec:
    """What decides the order of `text`; a stage starts with the first sequence of its step."""
    weights = data["weights"] or _own_weights(data, text)
    require_sources("data.weights", weights, text)
    stages = [Stage.of(0, weights, "data.weights")]
    for number, stage in enumerate(data["stages"]):
        where = f"data.stages[{number}].weights"
        if unknown := sorted(set(stage["weights"]) - set(text.sources)):
            raise DataError(f"{where}: {unknown[0]} is no source, the text has {', '.join(text.sources)}")
        stages.append(Stage.of(sizes.first_sequence(stage["start_step"]), stage["weights"], where))
    return StreamSpec(
        seq_len=data["seq_len"],
        stages=tuple(stages),
        seed=seed,
        shuffle=data["shuffle"],
        packing=data["packing"],
        mask_documents=data["intra_document_masking"],
        skip_ranges=tuple((first, end) for first, end in data["skip_ranges"]),
    )


def _own_weights(data: Mapping[str, Any], text: Text) -> Mapping[str, float]:
    if isinstance(text, TokenCorpus) and data["prepared"] is not None:
        return text.weights
    return {name: entry["weight"] for name, entry in data["sources"].items()}


def open_stream(text: Text, spec: StreamSpec) -> Stream:
    """The training sequences and validation rows of `text`."""
    if isinstance(text, TokenCorpus):
        return TokenStream(text, spec)
    assert isinstance(text, TextCorpus)
    return TextStream(text, spec)


def open_loader(
    stream: Stream, sizes: BatchSizes, micro_batch_size: int, *, report: Callable[[str], object], **settings: Any
) -> Loader:
    """Feed one data-parallel rank; `report` is told of bad rows that training meets, `settings` are as of
    `TrainLoader`."""
    if isinstance(stream, TokenStream):
        return TrainLoader(stream, sizes, micro_batch_size, **settings)
    assert isinstance(stream, TextStream)
    return TextLoader(stream, sizes, micro_batch_size, report=report, **settings)


def whole_state(loader: Loader, gather: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, Any]:
    """The state of a loader on all ranks; `gather` collects every rank's own, which prepared shards do not need."""
    state = loader.state_dict()
    return merge_states(gather(state)) if isinstance(loader, TextLoader) else state
