from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKENIZER

from data import DataError, Tokenizer
from data.tokenizer import BOS, EOS
from data.tokenizer.__main__ import main
from data.tokenizer.importing import import_tokenizer

PLAIN = Tokenizer.load(TOKENIZER)
Change = Callable[[dict[str, Any]], object]


def rename(content: dict[str, Any], names: dict[str, str]) -> None:
    """Give BOS and EOS other names, in the vocabulary and among the added tokens."""
    vocabulary = content["model"]["vocab"]
    for entry in content["added_tokens"]:
        old = entry["content"]
        entry["content"] = names[old]
        vocabulary[names[old]] = vocabulary.pop(old)


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[[Change], Path]:
    """A function that writes the bundled tokenizer with other special tokens, after a change."""

    def write(change: Change = lambda content: None) -> Path:
        content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
        rename(content, {BOS: "<s>", EOS: "</s>"})
        content["added_tokens"].append({**content["added_tokens"][0], "content": "<pad>", "id": 8192})
        change(content)
        path = tmp_path / "foreign.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return write


def test_a_file_of_the_family_stays_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "folder" / "tokenizer.json"
    assert import_tokenizer(TOKENIZER, out).digest == PLAIN.digest
    assert out.read_bytes() == TOKENIZER.read_bytes()
    assert list(out.parent.iterdir()) == [out]


def test_named_specials_are_found_again(foreign: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.json"
    import_tokenizer(foreign(), out, bos="<s>", eos="</s>")
    tokenizer = Tokenizer.load(out)
    assert (tokenizer.bos, tokenizer.bos_id, tokenizer.eos, tokenizer.eos_id) == ("<s>", 0, "</s>", 1)
    text = "of the 学 <s>x</s><pad>"
    assert tokenizer.encode("of the 学 ") == PLAIN.encode("of the 学 ")
    assert tokenizer.decode([0, *tokenizer.encode(text), 1]) == text
    again = tmp_path / "again.json"
    assert import_tokenizer(out, again).digest == tokenizer.digest
    assert import_tokenizer(out, again, eos="<pad>").eos_id == 8192


def test_the_library_opens_and_closes_documents_with_the_named_specials(
    foreign: Callable[..., Path], tmp_path: Path
) -> None:
    import tokenizers

    import_tokenizer(foreign(), tmp_path / "tokenizer.json", bos="<s>", eos="</s>")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.encode("of the").tokens == ["<s>", "of", "Ġthe", "</s>"]


def test_a_normalizer_goes_only_when_asked(foreign: Callable[..., Path], tmp_path: Path) -> None:
    path, out = foreign(lambda content: content.update(normalizer={"type": "NFC"})), tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="normalizer: NFC changes text, `import --drop-normalizer` removes it"):
        import_tokenizer(path, out, bos="<s>", eos="</s>")
    assert not out.exists()
    tokenizer = import_tokenizer(path, out, bos="<s>", eos="</s>", drop_normalizer=True)
    assert tokenizer.decode(tokenizer.encode("cafe\u0301")) == "cafe\u0301"


REFUSALS: dict[str, tuple[Change, dict[str, str], str]] = {
    "not named": (lambda content: None, {}, f"--bos: {BOS} is no special token of the file, it has <s>, </s>, <pad>$"),
    "EOS not named": (lambda content: None, {"bos": "<s>"}, f"--eos: {EOS} is no special token"),
    "unknown": (lambda content: None, {"bos": "<x>", "eos": "</s>"}, "--bos: <x> is no special token"),
    "the same": (lambda content: None, {"bos": "<s>", "eos": "<s>"}, "BOS and EOS are the same token <s>"),
    "ordinary": (
        lambda content: content["added_tokens"][1].update(special=False),
        {"bos": "<s>", "eos": "</s>"},
        "--eos: </s> is no special token of the file, it has <s>, <pad>",
    ),
    "not a BPE": (
        lambda content: content.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["</s>", 0.0]]}),
        {"bos": "<s>", "eos": "</s>"},
        "model: Unigram is not supported",
    ),
    "broken": (lambda content: content.pop("model"), {"bos": "<s>", "eos": "</s>"}, "not a tokenizer.json: no model"),
    "renumbered": (
        lambda content: content["added_tokens"][2].update(id=100_015),
        {"bos": "<s>", "eos": "</s>"},
        "ids must be without gaps before added tokens: '<pad>' is 100015, read as 8192",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, foreign: Callable[..., Path], tmp_path: Path) -> None:
    change, names, reason = REFUSALS[case]
    with pytest.raises(DataError, match=f"foreign.json: {reason}") as caught:
        import_tokenizer(foreign(change), tmp_path / "tokenizer.json", **names)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_command_says_what_it_took_over(
    foreign: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(lambda content: content["model"]["vocab"].update(zzq=8200))
    command = ["tokenizer", "import", str(path), "--out", str(tmp_path / "tokenizer.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--bos", "<s>", "--eos", "</s>"])
    assert main() == 77
    assert "ids must be without gaps before added tokens" in capsys.readouterr().err
    path = foreign(lambda content: (content["added_tokens"].pop(), content["model"]["vocab"].update(zzq=8200)))
    assert main() == 0
    facts = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (facts["vocab_size"], facts["unused_ids"], facts["bos"], facts["eos_id"]) == ("8201", "8", "<s>", "1")
