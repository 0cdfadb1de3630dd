"""Prepared corpora: shards, manifests, packing plans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from bad_inputs import Attempt, Bench, Case, Refused
from data.corpus import TokenCorpus

BIN, IDX = "train-en-00000.bin", "train-en-00000.idx"
Content = dict[str, Any]
Damage = Callable[[Path], object]

TOP = {
    "format_version": [None, "2", 1, 3, "x" * 10_000, True],
    "dtype": [None, 16, "int64", "object", "../x", "uint16\n"],
    "vocab_size": [None, "8192", 0, -1, 1 << 40, 8192.0, True, 10],
    "bos_id": [None, "0", -1, 1 << 20, True],
    "eos_id": [None, 1.0, -1, 1 << 20, 0],
    "tokenizer_xxh3": [None, 3, "", "00" * 16],
    "seed": [None, "0", 0.5, -1],
    "held_out": [None, 0.06, "half", "1/0", "nan", "-1/2", "2", "1"],
    "sources": [None, [], {}, {"en": 3}, "en"],
    "shards": [None, {}, [], [3], [[]]],
    "validation": [None, [], {"en": 3}, {"fr": {"xz_bits_per_byte": 1.0, "xz_primed_bits_per_byte": 1.0}}],
}
SOURCE = {
    "language": [None, 3, "EN", "../en", "en\nzh"],
    "weight": [None, "1", -1.0, float("nan"), float("inf"), True],
    "files": [None, {}, [3]],
    "documents": [None, "1", -1, 1.0],
    "duplicates": [None, "1", -1],
    "filtered": [None, [], {"too short": "1"}, {"too short": -1}],
    "quarantined": [None, "1", -1],
}
FILE = {"name": [None, 3], "size": [None, "1", -1], "stamp": [None, 3]}
SHARD = {
    "split": [None, 3, "test", "../train", "train\0"],
    "source": [None, 3, "fr", "../en", "/etc/passwd", "en\n"],
    "number": [None, "0", -1, 1, 1.0, 1 << 70],
    "tokens": [None, "9", 0, -1, 1, 1 << 62, 10**30],
    "documents": [None, "9", 0, -1, 1, 10**30],
    "text_bytes": [None, "9", 0, -1],
    "tokens_xxh3": [None, 3, "", "00" * 16, "\ud800"],
    "index_xxh3": [None, 3, "", "00" * 16],
}
BASELINE = {
    "xz_bits_per_byte": [None, "1", -1.0, float("nan")],
    "xz_primed_bits_per_byte": [None, "1", -1.0, float("inf")],
}
PLACES: dict[str, tuple[dict[str, list[Any]], Callable[[Content], Content]]] = {
    "manifest": (TOP, lambda content: content),
    "source": (SOURCE, lambda content: content["sources"]["en"]),
    "file": (FILE, lambda content: content["sources"]["en"]["files"][0]),
    "shard": (SHARD, lambda content: content["shards"][0]),
    "baseline": (BASELINE, lambda content: content["validation"]["en"]),
}
BAD_NAMES = ("../en", "/en", "EN", "", ".", "en\n", "en\0", "e" * 65, "en/zh", "\ud800", "é")
CONTENTS = {
    "empty": b"",
    "not JSON": b"manifest",
    "null": b"null",
    "array": b"[]",
    "object": b"{}",
    "invalid UTF-8": b'{"format_version": "\xff"}',
    "nested arrays": b"[" * 200_000,
    "nested objects": b'{"a":' * 200_000,
    "100 MB of zeros": bytes(100 << 20),
    "100 MB of brackets": b"[" * (100 << 20),
    "number of 5,000 digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


def rewrite(folder: Path, change: Callable[[Content], object]) -> None:
    """Change the manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def _edit(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None], repair: bool = True) -> None:
    """Change the numbers in a file of the first shard and, to get past the digests, what the manifest says of it."""
    path = folder / name
    numbers = np.fromfile(path, "<u2" if name == BIN else "<u8")
    changed = change(numbers)
    path.write_bytes((numbers if changed is None else changed).tobytes())
    if repair:
        key = "tokens_xxh3" if name == BIN else "index_xxh3"
        digest = xxhash.xxh3_128_hexdigest(path.read_bytes())
        rewrite(folder, lambda content: _first_shard(content).update({key: digest}))


def _first_shard(content: Content) -> Content:
    return next(shard for shard in content["shards"] if (shard["split"], shard["source"]) == ("train", "en"))


def _put(name: str, place: int, value: int, repair: bool = True) -> Damage:
    return lambda folder: _edit(folder, name, lambda numbers: numbers.__setitem__(place, value), repair)


def _swap(folder: Path) -> None:
    _edit(folder, IDX, lambda ends: np.concatenate([ends[1::-1], ends[2:]]))


def _repeat(folder: Path) -> None:
    _edit(folder, IDX, lambda ends: np.concatenate([ends[:1], ends[:1], ends[2:]]))


def _resized(name: str, change: int) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:change] if change < 0 else content + bytes(change))

    return damage


def _remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def _extra(name: str) -> Damage:
    return lambda folder: shutil.copy(folder / BIN, folder / name)


def _twice(content: Content) -> None:
    content["shards"].append(content["shards"][0])


FILES: dict[str, tuple[Damage, str]] = {
    "ids cut by a byte": (_resized(BIN, -1), "bytes, the manifest says"),
    "ids cut by an id": (_resized(BIN, -2), "bytes, the manifest says"),
    "ids longer": (_resized(BIN, 2), "bytes, the manifest says"),
    "ids empty": (lambda folder: (folder / BIN).write_bytes(b""), "bytes, the manifest says"),
    "index cut by a byte": (_resized(IDX, -1), "bytes, the manifest says"),
    "index longer": (_resized(IDX, 8), "bytes, the manifest says"),
    "ids missing": (_remove(BIN), "is missing"),
    "index missing": (_remove(IDX), "is missing"),
    "tokenizer missing": (_remove("tokenizer.json"), "is missing"),
    "ids a folder": (_as_folder(BIN), "is missing"),
    "shard that the manifest lacks": (_extra("train-en-00001.bin"), "train-en-00001.bin: is not in the manifest"),
    "an id changed": (_put(BIN, 7, 9, repair=False), "content does not match the manifest"),
    "an end changed": (_put(IDX, 0, 3, repair=False), "content does not match the manifest"),
    "id outside the vocabulary": (_put(BIN, 7, 8192), "token id 8192 is outside"),
    "id 65535": (_put(BIN, 7, 65535), "token id 65535 is outside"),
    "no BOS": (_put(BIN, 0, 7), "a document does not run from BOS to EOS"),
    "no EOS": (_put(BIN, -1, 7), "a document does not run from BOS to EOS"),
    "ends swapped": (_swap, "document ends do not increase"),
    "end repeated": (_repeat, "document ends do not increase"),
    "end of 0": (_put(IDX, 0, 0), "document ends do not increase"),
    "end of 1": (_put(IDX, 0, 1), "document ends do not increase"),
    "end past the shard": (_put(IDX, 0, 1 << 40), "document ends do not increase"),
    "end of 2^64 - 1": (_put(IDX, 0, (1 << 64) - 1), "document ends do not increase"),
    "last end too small": (_put(IDX, -1, 9), "last document ends at 9"),
    "last end too large": (_put(IDX, -1, 1 << 60), "last document ends at"),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n"),
        "tokenizer.json: content does not match the manifest",
    ),
    "wider ids than there are": (
        lambda folder: rewrite(folder, lambda content: content.update(dtype="uint32")),
        "bytes, the manifest says",
    ),
    "a larger vocabulary than the tokenizer's": (
        lambda folder: rewrite(folder, lambda content: content.update(vocab_size=9000)),
        "manifest.json: vocab_size is 9000, the tokenizer's is 8192",
    ),
    "a shard named twice": (lambda folder: rewrite(folder, _twice), "must be numbered from 0 on"),
    "manifest a folder": (_as_folder("manifest.json"), "manifest.json: is a folder"),
    "manifest missing": (_remove("manifest.json"), "manifest.json: no such file"),
}


def _damaged(damage: Damage) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        folder = bench.folder / "corpus"
        shutil.copytree(bench.corpus, folder)
        damage(folder)
        return lambda: TokenCorpus.open(folder).verify()

    return make


def _missing(place: Callable[[Content], Content], key: str) -> Damage:
    return lambda folder: rewrite(folder, lambda content: place(content).pop(key))


def _set(place: Callable[[Content], Content], key: str, value: object) -> Damage:
    return lambda folder: rewrite(folder, lambda content: place(content).update({key: value}))


def _renamed(name: str) -> Damage:
    def change(content: Content) -> None:
        content["sources"][name] = content["sources"].pop("en")
        for shard in content["shards"]:
            shard["source"] = shard["source"].replace("en", name)

    return lambda folder: rewrite(folder, change)


def _replaced(content: bytes) -> Damage:
    return lambda folder: (folder / "manifest.json").write_bytes(content)


CASES: dict[str, Case] = {
    **{f"corpus: {name}": Refused(_damaged(damage), reason) for name, (damage, reason) in FILES.items()},
    **{
        f"{what}: no {key}": Refused(_damaged(_missing(place, key)), rf"manifest\.json: .*{key}")
        for what, (fields, place) in PLACES.items()
        for key in fields
    },
    **{
        f"{what}: {key} {str(value)[:20]!r} {number}": Refused(_damaged(_set(place, key, value)), r"/corpus/[\w.-]+: .")
        for what, (fields, place) in PLACES.items()
        for key, values in fields.items()
        for number, value in enumerate(values)
    },
    **{f"manifest: source {name!r}": Refused(_damaged(_renamed(name)), r"manifest\.json: ") for name in BAD_NAMES},
    **{
        f"manifest: {name}": Refused(_damaged(_replaced(content)), r"manifest\.json: (not JSON|not a JSON|format_v)")
        for name, content in CONTENTS.items()
    },
}
