"""Sources tokenised while training as a stream: a spec, its fingerprint, and rows of held-out text."""

from __future__ import annotations

from data.errors import DataError
from data.spec import StreamSpec
from data.stream import Stream
from data.text.corpus import TextCorpus


class TextStream(Stream):
    """The training sequences of a corpus that is tokenised while training, dealt to virtual streams.

    They come in order only, from a `TextLoader`; the spec's `shuffle` plays no part.

    Raises:
        DataError: weights that do not name the corpus's sources, or a packing that needs all documents beforehand.
    """

    def __init__(self, corpus: TextCorpus, spec: StreamSpec) -> None:
        if spec.packing != "chunk":
            raise DataError(f"packing: {spec.packing} needs all documents' lengths beforehand, use data.prepare")
        super().__init__(corpus, spec)
        self.corpus = corpus
