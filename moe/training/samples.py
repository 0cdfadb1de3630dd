"""What the finished model writes: completions of prompts, their words counted against the training text's."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

from data import Text, Tokenizer
from moe.config.schema import Config
from moe.model import Transformer
from moe.model.sampling import continuation

_WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?|[\u4e00-\u9fff]{2,}")
_LEXICON_TOKENS = 4_000_000
_MIN_OCCURRENCES = 2


def complete_prompts(model: Transformer, text: Text, config: Config) -> list[dict[str, Any]]:
    """The rows of samples.json: for every configured prompt of a language that the corpus has, a completion and its
    words."""
    tokenizer = Tokenizer.load(text.tokenizer_path)
    rows = []
    model.eval()
    for language, prompts in config.telemetry.prompts.items():
        if language not in text.languages:
            continue
        known = lexicon(tokenizer.decode(text.sample(language, _LEXICON_TOKENS).tolist()))
        for prompt in prompts:
            with torch.compiler.set_stance("force_eager"):  # every token has a new length
                completion = complete(model, tokenizer, prompt, config)
            found = words(completion)
            rows.append(
                {
                    "language": language,
                    "prompt": prompt,
                    "completion": completion,
                    "words": len(found),
                    "known_words": sum(word in known for word in found),
                }
            )
    return rows


def complete(model: Transformer, tokenizer: Tokenizer, prompt: str, config: Config) -> str:
    """A completion of up to 80 tokens, the same for the same weights."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    room = min(80, model.config.max_position_embeddings - len(ids))
    new = continuation(
        model,
        ids,
        room,
        temperature=0.7,
        top_p=0.9,
        stop_id=tokenizer.eos_id,
        num_ids=tokenizer.vocab_size,
        seed=config.train.seed,
        compute_dtype=getattr(torch, config.train.compute_dtype),
    )
    return tokenizer.decode(list(new))


def lexicon(text: str) -> set[str]:
    """The words that occur at least twice in `text`."""
    return {word for word, count in Counter(words(text)).items() if count >= _MIN_OCCURRENCES}


def words(text: str) -> list[str]:
    """Words in the Latin alphabet, lower case; of runs of Chinese characters, every pair of neighbours."""
    found = []
    for match in _WORD.findall(text):
        if match[0].isascii():
            found.append(match.lower())
        else:
            found += [match[i : i + 2] for i in range(len(match) - 1)]
    return found
