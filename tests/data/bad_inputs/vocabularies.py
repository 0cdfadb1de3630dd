"""Tokenizer files."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from typing import Any

from conftest import TOKENIZER

from bad_inputs import Attempt, Bench, Case, Refused
from data.tokenizer import BOS, EOS, Tokenizer
from data.tokenizer.importing import import_tokenizer
from data.tokenizer.ranks import load_ranks

Content = dict[str, Any]
GOOD = TOKENIZER.read_bytes()
NOT_ONE = "not a tokenizer.json"


def template(bos: str, eos: str) -> Content:
    """A post-processor that names BOS and EOS."""
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single.append({"SpecialToken": {"id": eos, "type_id": 0}})
    tokens = {name: {"id": name, "ids": [1], "tokens": [name]} for name in (bos, eos)}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def added(token: str, index: object, special: bool = False, **flags: bool) -> Content:
    """An added token."""
    return {
        "id": index,
        "content": token,
        "special": special,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        **flags,
    }


def nested(kind: str, parts: str, depth: int) -> Content:
    """A component of sequences in sequences."""
    component: Content = {"type": "Sequence", parts: []}
    for _ in range(depth):
        component = {"type": "Sequence", parts: [component]}
    return {kind: component}


def _vocab(**entries: object) -> Callable[[Content], object]:
    return lambda content: content["model"]["vocab"].update(entries)


def _model(**entries: object) -> Callable[[Content], object]:
    return lambda content: content["model"].update(entries)


def _top(**entries: object) -> Callable[[Content], object]:
    return lambda content: content.update(entries)


def _add(*tokens: Content) -> Callable[[Content], object]:
    return lambda content: content["added_tokens"].extend(tokens)


def _pattern(regex: str) -> Callable[[Content], object]:
    return lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": regex})


CHANGES: dict[str, tuple[Callable[[Content], object], str]] = {
    "two tokens of one id": (_vocab(zzq=5), "ids must be unique"),
    "id 4294967295": (_vocab(zzq=4294967295), "ids must be below 2"),
    "id 2147483648": (_vocab(zzq=1 << 31), "ids must be below 2"),
    "id 4294967296": (_vocab(zzq=1 << 32), NOT_ONE),
    "negative id": (_vocab(zzq=-1), NOT_ONE),
    "fractional id": (_vocab(zzq=0.5), NOT_ONE),
    "id in quotes": (_vocab(zzq="5"), NOT_ONE),
    "null id": (_vocab(zzq=None), NOT_ONE),
    "mostly holes": (_vocab(zzq=1 << 20), "ids must be dense"),
    "added token of id 4294967295": (_add(added("<x>", 4294967295)), "ids must be below"),
    "added token of a used id": (_add(added("<x>", 5)), "ids must be unique"),
    "added token without id": (_add({"content": "<x>"}), NOT_ONE),
    "added token that is empty": (_add(added("", 8192)), "is 8192, read as None"),
    "added token, null": (_top(added_tokens=[None]), NOT_ONE),
    "added tokens, null": (_top(added_tokens=None), NOT_ONE),
    "added tokens, an object": (_top(added_tokens={}), NOT_ONE),
    "vocabulary empty": (_model(vocab={}, merges=[]), "text would be lost"),
    "vocabulary a list": (_model(vocab=[["a", 0]]), NOT_ONE),
    "vocabulary null": (_model(vocab=None), NOT_ONE),
    "merges null": (_model(merges=None), NOT_ONE),
    "merges missing": (lambda content: content["model"].pop("merges"), NOT_ONE),
    "merge of three": (lambda content: content["model"]["merges"].append(["a", "b", "c"]), NOT_ONE),
    "merge of unknown tokens": (lambda content: content["model"]["merges"].append(["qqqq", "zzzz"]), NOT_ONE),
    "no special tokens": (_top(added_tokens=[]), "is missing"),
    "BOS is EOS": (_top(post_processor=template(BOS, BOS)), "BOS and EOS are the same token"),
    "EOS an ordinary token": (lambda content: content["added_tokens"][1].update(special=False), f"{EOS} is missing"),
    "template of an unknown token": (_top(post_processor=template("<s>", EOS)), "<s> is missing"),
    "template of a number": (_top(post_processor={"type": "TemplateProcessing", "single": 3}), NOT_ONE),
    "post-processor a string": (_top(post_processor="none"), NOT_ONE),
    "lower case": (_top(normalizer={"type": "Lowercase"}), "normalizer: Lowercase changes text"),
    "NFKC": (_top(normalizer={"type": "NFKC"}), "normalizer: NFKC changes text"),
    "replacing": (
        _top(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b"}),
        "normalizer: Replace changes text",
    ),
    "unknown normalizer": (_top(normalizer={"type": "Python"}), NOT_ONE),
    "splitting off blanks": (_top(pre_tokenizer={"type": "WhitespaceSplit"}), "loses blanks"),
    "no byte level": (_top(pre_tokenizer=None), "text changes"),
    "no decoder": (_top(decoder=None), "text changes"),
    "another decoder": (_top(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "text changes"),
    "sequences in sequences": (_top(**nested("pre_tokenizer", "pretokenizers", 100)), NOT_ONE),
    "word level": (_top(model={"type": "WordLevel", "vocab": {BOS: 0, EOS: 1}, "unk_token": BOS}), "WordLevel is not"),
    "unigram": (_top(model={"type": "Unigram", "unk_id": 0, "vocab": [[BOS, 0.0]], "byte_fallback": False}), "Unigram"),
    "unknown model": (_top(model={"type": "Pickle", "vocab": {}}), NOT_ONE),
    "dropout": (_model(dropout=0.5), "model.dropout"),
    "dropout of two": (_model(dropout=2.0), "model.dropout|not a"),
    "NaN": (_top(truncation=float("nan")), NOT_ONE),
    "unknown version": (_top(version="9.9"), NOT_ONE),
    "bad pattern": (_pattern("(["), NOT_ONE),
    "pattern that backtracks": (_pattern("(a+)+$"), "cannot be encoded"),
    "pattern that backtracks on letters": (_pattern(r"(\w|\w\w)*\d$"), "cannot be encoded"),
}
CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", NOT_ONE),
    "not JSON": (b"tokenizer", NOT_ONE),
    "null": (b"null", NOT_ONE),
    "array": (b"[]", NOT_ONE),
    "object": (b"{}", NOT_ONE),
    "truncated": (GOOD[: len(GOOD) // 2], NOT_ONE),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, NOT_ONE),
    "UTF-16": (GOOD.decode().encode("utf-16"), NOT_ONE),
    "gzip": (gzip.compress(GOOD), NOT_ONE),
    "nested arrays": (b"[" * 100_000, NOT_ONE),
    "nested objects": (b'{"model":' * 100_000, NOT_ONE),
    "pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", NOT_ONE),
}
RANKS = b"".join(b"%b %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256))
BAD_RANKS = {
    "empty": (b"", "256 of 256 bytes have no rank"),
    "not base64": (b"!! 1\n", r"a\.tiktoken:1: must be a token in base64"),
    "no rank": (RANKS + b"YWI=\n", r"a\.tiktoken:257: must be"),
    "negative rank": (RANKS + b"YWI= -5\n", r"a\.tiktoken: "),
    "rank 2^40": (RANKS + b"YWI= 1099511627776\n", r"a\.tiktoken: "),
    "a byte missing": (RANKS.split(b"\n", 1)[1], "1 of 256 bytes have no rank"),
    "token without merge": (RANKS + b"YWJjZA== 300\n", r"no merge of tokens"),
}


def _changed(change: Callable[[Content], object]) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        content = json.loads(GOOD)
        change(content)
        path = bench.write("tokenizer.json", json.dumps(content).encode())
        return lambda: Tokenizer.load(path)

    return make


def _content(content: bytes) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        path = bench.write("tokenizer.json", content)
        return lambda: Tokenizer.load(path)

    return make


def _imported(change: Callable[[Content], object], **options: str) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        content = json.loads(GOOD)
        change(content)
        path = bench.write("tokenizer.json", json.dumps(content).encode())
        return lambda: import_tokenizer(path, bench.folder / "out.json", **options)  # type: ignore[arg-type]

    return make


def _ranks(content: bytes) -> Callable[[Bench], Attempt]:
    def make(bench: Bench) -> Attempt:
        path = bench.write("a.tiktoken", content)
        return lambda: load_ranks(path)

    return make


def _sparse(bench: Bench) -> Attempt:
    path = bench.folder / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 36)
    return lambda: Tokenizer.load(path)


def _lone_surrogate(bench: Bench) -> Attempt:
    return lambda: Tokenizer.load(TOKENIZER).encode("\ud800")


def _nothing(content: Content) -> None:
    pass


CASES: dict[str, Case] = {
    **{
        f"tokenizer: {name}": Refused(_changed(change), rf"tokenizer\.json: .*({reason})")
        for name, (change, reason) in CHANGES.items()
    },
    **{
        f"tokenizer: {name}": Refused(_content(content), rf"tokenizer\.json: {reason}")
        for name, (content, reason) in CONTENTS.items()
    },
    **{f"ranks: {name}": Refused(_ranks(content), reason) for name, (content, reason) in BAD_RANKS.items()},
    "tokenizer: 64 GB of nothing": Refused(_sparse, "bytes are too many for a tokenizer"),
    "tokenizer: text with a lone surrogate": Refused(_lone_surrogate, "text cannot be encoded"),
    "import: unknown BOS": Refused(_imported(_nothing, bos="<s>"), r"tokenizer\.json: --bos: <s> is no special token"),
    "import: BOS is EOS": Refused(_imported(_nothing, bos=EOS), "BOS and EOS are the same token"),
    "import: entry without content": Refused(_imported(_top(added_tokens=[{"id": 0}])), NOT_ONE),
    "import: normalizer": Refused(_imported(_top(normalizer={"type": "NFC"})), "normalizer: NFC changes text"),
}
