"""From text to batches.

    files, hub, http, s3        sources/       where text lies; units that are read on their own; rows, bad ones named
          |
          |                     split.py       whole documents held out by a hash of their text
          |                     tokenizer/     byte-level BPE, trained on the training split alone, or imported
          v
    corpus folder               prepare/       shards of tokens, document ends, tokenizer, digests (corpus.py)
          |
          v                     order.py       which source, which row: exact mixture, permutation, skipped ranges
    TokenStream                 packing.py     documents end to end, or fitted whole into rows
          |                     token_stream.py   sequence g as a pure function of (spec, seed, g)
          v
    TrainLoader                 loader.py      this rank's slice of every global batch; its state is one integer
          |
          v
    Batch                       batch.py       ids, labels, languages, documents as tensors

    text/ is the other way from sources to batches: tokenised while training, in virtual streams. pipeline.py opens what
    a configuration names; spec.py is what decides the order, and its fingerprint.

Nothing here knows of the model. The commands are `python -m data.tokenizer`, `data.prepare` and `data.inspect`.

Names load when they are first used: most processes that read text have no need of torch, which takes a second to load.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors
    from data.batch import IGNORE_INDEX, Batch
    from data.corpus import TokenCorpus
    from data.documents import Document
    from data.errors import EXIT_DATA_ERROR, DataError
    from data.loader import BatchSizes, TrainLoader
    from data.order import Mixture, Stage
    from data.spec import StreamSpec
    from data.stream import Stream, Text, validation_batches
    from data.token_stream import TokenStream
    from data.tokenizer import Tokenizer

_HOME = {
    "IGNORE_INDEX": "batch",
    "Batch": "batch",
    "Document": "documents",
    "EXIT_DATA_ERROR": "errors",
    "DataError": "errors",
    "BatchSizes": "loader",
    "TrainLoader": "loader",
    "Mixture": "order",
    "Stage": "order",
    "TokenCorpus": "corpus",
    "StreamSpec": "spec",
    "Stream": "stream",
    "Text": "stream",
    "validation_batches": "stream",
    "TokenStream": "token_stream",
    "Tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"data.{_HOME[name]}"), name)
