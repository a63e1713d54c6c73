"""What the tokenizer files of a model folder say about token ids, without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsys.model.folder import read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
)
"""The JSON files that this module reads, beside config.json."""


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a vocabulary, in one of the forms that transformers reads."""
    names = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
    return any((folder / name).is_file() for name in names) or any(folder.glob("*.model"))


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id, added tokens included; empty if no file says."""
    content = read_json(folder / "tokenizer.json")
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # of a unigram model: (token, score) by id
        vocabulary = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
    vocabulary = vocabulary or _sentencepieces(folder)
    if not vocabulary:
        return {}
    ids: dict[str, int] = dict(vocabulary)
    ids |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    ids |= read_json(folder / "added_tokens.json")
    decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return ids | {entry["content"]: int(token_id) for token_id, entry in decoder.items()}


def _sentencepieces(folder: Path) -> dict[str, int]:
    """Piece -> id of a folder with only `tokenizer.model`, which transformers converts."""
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:  # a file of another kind
        return {}
    return {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}


def num_token_ids(folder: Path) -> int | None:
    """One more than the largest id that decodes to a token; None if no file says."""
    ids = token_ids(folder)
    return max(ids.values()) + 1 if ids else None


def eos_token_ids(folder: Path) -> Iterator[tuple[Path, Any]]:
    """Each eos_token_id of config.json and generation_config.json, with the file that has it."""
    for name in ("config.json", "generation_config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is not None:
                yield folder / name, token_id


def eos_token(folder: Path) -> str | None:
    """The end-of-sequence token of the tokenizer."""
    token = read_json(folder / "tokenizer_config.json").get("eos_token")
    # It may be a mapping that also says how the token is stripped.
    return token.get("content") if isinstance(token, dict) else token


def chat_template(folder: Path) -> str:
    """The text of the folder's chat template, or of all if it has several; empty without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json(folder / name).get("chat_template")
        if template:
            return template if isinstance(template, str) else json.dumps(template)
    return ""


def resize_remedy(num_tokens: int) -> str:
    """What to do if a tokenizer has more tokens than its model has embeddings."""
    return (
        f"Save the model after `model.resize_token_embeddings({num_tokens})`, or use the tokenizer "
        "that it was trained with"
    )
