"""Saved positions of both loaders, and cached files: packing plans, plans of units, held-out documents."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from conftest import TOKENIZER

from bad_inputs import Attempt, Bench, Case, Refused, json_line
from data.corpus import TokenCorpus
from data.loader import TrainLoader
from data.prepare import Filters, prepare
from data.prepare.plan import work_folder
from data.sources import SourceSpec
from data.spec import StreamSpec
from data.text.corpus import TextCorpus
from data.text.cursor import merge_states
from data.text.loader import TextLoader
from data.text.stream import TextStream
from data.token_stream import TokenStream
from data.tokenizer import Tokenizer

STREAMS = 4
State = dict[str, Any]
GONE = object()


def text_corpus(bench: Bench) -> TextCorpus:
    """A corpus of 400 rows, tokenised while training."""
    rows = b"".join(json_line(text=f"Row number {number} of them") for number in range(400))
    path = bench.folder / "en.jsonl"
    if not path.exists():  # a file written anew is another file
        path.write_bytes(rows)
    source = SourceSpec("en", str(path), language="en")
    return TextCorpus.open([source], TOKENIZER, streams=STREAMS, cache_dir=bench.folder / "cache")


def _text_loader(bench: Bench) -> TextLoader:
    return TextLoader(TextStream(text_corpus(bench), StreamSpec.single_stage(16, {"en": 1})), STREAMS, 1, workers=0)


def _token_loader(bench: Bench) -> TrainLoader:
    stream = TokenStream(TokenCorpus.open(bench.corpus), StreamSpec.single_stage(16, {"en": 1, "zh": 1}))
    return TrainLoader(stream, STREAMS, 1)


def _resumed(open_loader: Callable[[Bench], Any], change: State, steps: int = 1) -> Callable[[Bench], Attempt]:
    """Resume from a state with some of its entries changed, and go on."""

    def make(bench: Bench) -> Attempt:
        with _closing(open_loader(bench)) as loader:
            next(loader)
            state = json.loads(json.dumps(loader.state_dict()))
        changed = {key: value for key, value in {**state, **change}.items() if value is not GONE}

        def attempt() -> None:
            with _closing(open_loader(bench)) as resumed:
                resumed.load_state_dict(changed)
                for _ in range(steps):
                    next(resumed)

        return attempt

    return make


@contextmanager
def _closing(loader: Any) -> Iterator[Any]:
    try:
        yield loader
    finally:
        loader.close()


def varints(*values: int) -> str:
    """Numbers below 128 as cursors are kept."""
    return base64.b64encode(bytes(values)).decode()


NUMBERS: dict[str, object] = {
    "missing": GONE,
    "null": None,
    "-1": -1,
    "in quotes": "4",
    "4.0": 4.0,
    "NaN": float("nan"),
    "true": True,
    "a list": [4],
}
FINGERPRINTS: dict[str, object] = {
    "missing": GONE,
    "null": None,
    "a number": 5,
    "empty": "",
    "short": "0" * 47,
    "foreign": "0" * 48,
    "a list": ["0"] * 48,
}
CURSORS: dict[str, object] = {
    "missing": GONE,
    "null": None,
    "a number": 3,
    "a list": [],
    "empty": "",
    "not base64": "!!!!",
    "cut base64": varints(*[0] * 16)[:-1],
    "cut": base64.b64encode(bytes([0] * 15 + [128])).decode(),
    "too few": varints(*[0] * 15),
    "too many": varints(*[0] * 17),
    "of another number of sources": varints(*[0] * 32),
    "number above 2^53": base64.b64encode(bytes([255] * 9 + [1] + [0] * 15)).decode(),
    "endless number": base64.b64encode(bytes([255] * 10_000)).decode(),
    "not ASCII": "中",
}
POSITIONS = {
    "unit past the end": varints(*[0, 127, 0, 0] * STREAMS),
    "row past the end": varints(*[0, 0, 127, 0] * STREAMS),
    "offset past the end": varints(*[0, 0, 0, 127] * STREAMS),
}
MERGED: dict[str, Callable[[State], object]] = {
    "empty": lambda state: state.clear(),
    "no first stream": lambda state: state.pop("first_stream"),
    "first stream in quotes": lambda state: state.update(first_stream="0"),
    "no streams": lambda state: state.pop("streams"),
    "another step": lambda state: state.update(consumed=99),
    "another run": lambda state: state.update(fingerprint="0" * 48),
    "part missing": lambda state: state.update(first_stream=2),
    "no cursors": lambda state: state.pop("cursors"),
    "cursors of a number": lambda state: state.update(cursors=3),
    "cursors cut": lambda state: state.update(cursors="AAA"),
}


def _work_plan(content: bytes) -> Callable[[Bench], Attempt]:
    """The plan in the work folder of an interrupted `data.prepare` is damaged."""

    def make(bench: Bench) -> Attempt:
        spec = SourceSpec("books", str(bench.write("en.jsonl", json_line(text="a", lang="en") * 9)))
        work = work_folder(bench.folder / "out", [spec], Tokenizer.load(TOKENIZER).digest, Filters())
        for name in ("plan.json", "lock", "tokenizer.json"):
            bench.write(f"{work.name}/{name}", content)
        return lambda: prepare([spec], TOKENIZER, bench.folder / "out")

    return make


WORK_PLANS = {"empty": b"", "cut": b'{"tokenizer_xxh3": ', "list": b"[]", "object": b"{}", "nested": b"[" * 100_000}
WORK_PLANS["of wrong types"] = b'{"tokenizer_xxh3": 1, "filters": 2, "sources": 3, "files": 4, "units": 5}'


def _merged(change: Callable[[State], object]) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        state = {"consumed": 4, "fingerprint": "f" * 48, "first_stream": 0, "streams": 4, "sources": ["en"]}
        other = {**state, "first_stream": 4, "cursors": varints(0)}
        first = {**state, "cursors": varints(0)}
        change(first)
        return lambda: merge_states([first, other])

    return make


CASES: dict[str, Case] = {
    **{
        f"state of {mode}: `consumed` {name}": Refused(
            _resumed(loader, {"consumed": value}), "data state: .*`consumed`"
        )
        for mode, loader in (("tokens", _token_loader), ("text", _text_loader))
        for name, value in NUMBERS.items()
    },
    **{
        f"state of {mode}: fingerprint {name}": Refused(
            _resumed(loader, {"fingerprint": value}), "data state: .*changed"
        )
        for mode, loader in (("tokens", _token_loader), ("text", _text_loader))
        for name, value in FINGERPRINTS.items()
    },
    **{
        f"state of text: {key} {name}": Refused(_resumed(_text_loader, {key: value}), "data state: has streams from")
        for key in ("first_stream", "streams")
        for name, value in {"missing": GONE, "null": None, "-1": -1, "in quotes": "0", "2^70": 1 << 70}.items()
    },
    **{
        f"state of text: sources {name}": Refused(_resumed(_text_loader, {"sources": value}), "data state: .*sources")
        for name, value in {
            "missing": GONE,
            "null": None,
            "a name": "en",
            "numbers": [3],
            "too many": ["en", "x"],
        }.items()
    },
    **{
        f"state of text: cursors {name}": Refused(_resumed(_text_loader, {"cursors": value}), "data state: `cursors`")
        for name, value in CURSORS.items()
    },
    "state of text: not of a whole turn": Refused(_resumed(_text_loader, {"consumed": 3}), "not a multiple of"),
    **{
        f"work folder: plan {name}": Refused(_work_plan(content), r"plan\.json: is damaged; remove .*work-")
        for name, content in WORK_PLANS.items()
    },
    **{f"state of a rank: {name}": Refused(_merged(change), "data state: ") for name, change in MERGED.items()},
}
# A position past the end is the end of a pass over the source: the next one begins, and nothing has to be said.
PAST_THE_END = {name: _resumed(_text_loader, {"cursors": value}, steps=3) for name, value in POSITIONS.items()}


def damaged_plans(path: Path) -> Iterator[bytes]:
    """A packing plan, damaged in many ways."""
    content = path.read_bytes()
    yield from (b"", b"\0", content[:24], content[:-8], content + bytes(8), bytes(len(content)))
    dice = np.random.default_rng(0)
    for place in dice.integers(0, len(content), 30).tolist():
        yield content[:place] + bytes([content[place] ^ 0x81]) + content[place + 1 :]
