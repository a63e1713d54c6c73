"""What the tokenizer files of a model folder say about token ids, without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlsys.model.shape import ModelShape

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.json",
)
"""What this module reads of a model folder, besides templates that are no JSON."""


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id, of the tokenizer and what was added beside it; empty where no file says."""
    content = _read(folder / "tokenizer.json")
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # a unigram model's, (token, score) by id
        vocabulary = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
    vocabulary = vocabulary or _sentencepieces(folder)
    if not vocabulary:
        return {}
    ids: dict[str, int] = dict(vocabulary)
    ids |= {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
    ids |= _read(folder / "added_tokens.json")
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return ids | {entry["content"]: int(token_id) for token_id, entry in decoder.items()}


def num_token_ids(folder: Path) -> int | None:
    """One more than the largest id that decodes to a token; None where the files do not say."""
    ids = token_ids(folder)
    return max(ids.values()) + 1 if ids else None


def id_gap_notes(folder: Path) -> Iterator[str]:
    """Ids between tokens without a token of their own: they can be sampled."""
    ids = set(token_ids(folder).values())
    gaps = max(ids) + 1 - len(ids) if ids else 0
    if gaps:
        yield (
            f"{gaps:,} ids below {max(ids):,} have no token in the tokenizer of {folder}: "
            "completions may hold them, and their text does not show them"
        )


def chat_template(folder: Path) -> str:
    """The text of the folder's chat template, of all where it has several; empty without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read(folder / name).get("chat_template")
        if template:
            return template if isinstance(template, str) else json.dumps(template)
    return ""


def tokenizer_problems(folder: Path, shape: ModelShape) -> Iterator[str]:
    """Tokens that prompts or completions need and the model has no embedding for."""
    template, size = chat_template(folder), shape.vocab_size
    eos_token = _read(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(eos_token, dict):  # with how it is stripped
        eos_token = eos_token.get("content")
    outside = {token: i for token, i in token_ids(folder).items() if i >= size}
    for token, token_id in sorted(outside.items(), key=lambda entry: entry[1]):
        if token in template or token == eos_token:
            what = "chat template writes the token" if token in template else "eos_token is"
            yield (
                f"{folder}: its {what} {token!r} of id {token_id}, and "
                f"the model has embeddings for {size:,} tokens (vocab_size in config.json), ids 0 "
                f"to {size - 1:,}. {resize_remedy(max(outside.values()) + 1)}"
            )
    for name in ("config.json", "generation_config.json"):
        ids = _read(folder / name).get("eos_token_id")
        for eos in ids if isinstance(ids, list) else [ids]:
            if eos is not None and (type(eos) is not int or not 0 <= eos < size):
                yield (
                    f"{folder / name}: eos_token_id {eos!r} is not one of the model's "
                    f"{size:,} tokens (vocab_size in config.json): correct it"
                )


def resize_remedy(num_tokens: int) -> str:
    """What to do where a tokenizer has more tokens than its model."""
    return (
        f"Save the model after `model.resize_token_embeddings({num_tokens})`, or use the tokenizer "
        "that it was trained with"
    )


def _sentencepieces(folder: Path) -> dict[str, int]:
    """The pieces of a folder with `tokenizer.model` alone, which transformers converts."""
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return {}
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:  # a file of another kind
        return {}
    return {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
