"""Take over another project's byte-level BPE `tokenizer.json`, the released models' among them."""

from __future__ import annotations

import json
from pathlib import Path

from data.errors import DataError
from data.files import write_whole
from data.tokenizer import Tokenizer, errors_name, read_tokenizer
from data.tokenizer.layout import name_specials, parse, special_names


def import_tokenizer(
    path: str | Path,
    out: str | Path,
    *,
    bos: str | None = None,
    eos: str | None = None,
    drop_normalizer: bool = False,
) -> Tokenizer:
    """Check `path` and write it to `out`, in the standard format; ids never change.

    The copy is byte for byte unless something must be recorded in it: `bos` and `eos`, which become the template of its
    post-processor, or the loss of the normalizer. The DeepSeek family's BOS and EOS need no naming.

    Raises:
        DataError: as `Tokenizer.load`; `bos` or `eos` is no special token of the file; the model needs the normalizer.
    """
    content, name = read_tokenizer(path), str(path)
    with errors_name(name, "not a tokenizer.json"):
        layout = parse(content)
        declared = special_names(layout)
        special = [entry["content"] for entry in layout.get("added_tokens", []) if entry["special"]]
    wanted = (bos or declared[0], eos or declared[1])
    for option, token in zip(("--bos", "--eos"), wanted, strict=True):
        if token not in special:
            raise DataError(f"{name}: {option}: {token} is no special token of the file, it has {_some(special)}")
    changes: dict[str, object] = {"normalizer": None} if drop_normalizer and layout.get("normalizer") else {}
    if wanted != declared:
        changes["post_processor"] = name_specials(layout, *wanted)["post_processor"]
    if changes:
        content = (json.dumps({**layout, **changes}, ensure_ascii=False) + "\n").encode()
    tokenizer = Tokenizer(content, name)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(out), content)
    return tokenizer


def _some(tokens: list[str]) -> str:
    shown = ", ".join(tokens[:8]) or "none"
    return shown + (f" and {len(tokens) - 8} more" if len(tokens) > 8 else "")
