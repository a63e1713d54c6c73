"""Which tokens end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase


def read_stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every EOS token that the model folder names, in ascending order.

    Chat models often have several: the tokenizer's ends a turn, generation_config.json adds the
    one that ends a document. Any of them ends a completion, and is its last token.

    Raises:
        ValueError: none is named anywhere, so completions could only end at the length limit.
    """
    found = _eos_of(folder / "generation_config.json") | _eos_of(folder / "config.json")
    if tokenizer.eos_token_id is not None:
        found |= _as_set(tokenizer.eos_token_id)
    if not found:
        raise ValueError(
            f"no end-of-sequence token is known for the model in {folder}: neither "
            "generation_config.json nor config.json has eos_token_id, and the tokenizer has no "
            "eos_token. Add one of them."
        )
    return sorted(found)


def _eos_of(file: Path) -> set[int]:
    if not file.is_file():
        return set()
    return _as_set(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))


def _as_set(value: Any) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}
