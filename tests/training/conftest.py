from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_helpers import ROOT


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few kilobytes of the bundled corpus, which also keeps them prepared between runs."""
    folder = tmp_path_factory.mktemp("corpus")
    for language in ("en", "zh"):
        lines = (ROOT / "data" / "sample" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        rows = [json.loads(line) for line in lines]
        short = [{**row, "source": "all", "text": row["text"][:600]} for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in short)
        (folder / f"{language}.jsonl").write_text(text, encoding="utf-8")
    return folder
