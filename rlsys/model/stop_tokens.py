"""What ends a completion: tokens that the model's files name, and what the config adds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlsys.config import RolloutConfig


@dataclass(frozen=True, slots=True)
class StopRules:
    """Everything that ends a completion, which is trained on up to there."""

    eos_token_ids: list[int]
    """EOS tokens of the model folder."""
    more_token_ids: list[int]
    """Tokens of rollout.stop_token_ids, and texts of rollout.stop that are special tokens."""
    texts: list[str]
    """Texts of rollout.stop that may span several tokens."""
    keeps_stop: bool
    """Whether what rollout.stop and rollout.stop_token_ids name stays in the text."""

    @property
    def token_ids(self) -> list[int]:
        """All tokens that end a completion, in ascending order."""
        return sorted({*self.eos_token_ids, *self.more_token_ids})

    def tokens_of_text(self, token_ids: list[int]) -> list[int]:
        """The tokens of a completion that ended by itself, without the one that ended it."""
        last = token_ids[-1]
        ends = last in self.eos_token_ids or (last in self.more_token_ids and not self.keeps_stop)
        return token_ids[:-1] if ends else token_ids

    def cut(self, text: str) -> str:
        """`text` up to the first of `texts`, or with it: a token may go on behind it."""
        found = [(start, stop) for stop in self.texts if (start := text.find(stop)) >= 0]
        if not found:
            return text
        start, stop = min(found)
        return text[: start + len(stop)] if self.keeps_stop else text[:start]


def read_stop_rules(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rollout: RolloutConfig
) -> StopRules:
    """The stop rules of a model folder and a config.

    Chat models often have several EOS tokens: the tokenizer's ends a turn, generation_config.json
    adds the one that ends a document. Any of them ends a completion, and is its last token.

    Raises:
        ValueError: nothing ends a completion but the length limit; a stop token that the model does
            not have.
    """
    eos = _eos_of(folder / "generation_config.json") | _eos_of(folder / "config.json")
    if tokenizer.eos_token_id is not None:
        eos |= _as_set(tokenizer.eos_token_id)
    added = tokenizer.get_added_vocab()
    more = {*rollout.stop_token_ids, *(added[text] for text in rollout.stop if text in added)}
    if not (eos or more or rollout.stop):
        raise ValueError(
            f"no end-of-sequence token is known for the model in {folder}: neither "
            "generation_config.json nor config.json has eos_token_id, and the tokenizer has no "
            "eos_token. Set rollout.stop_token_ids or rollout.stop."
        )
    size = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    outside = sorted(token_id for token_id in more if size is not None and token_id >= size)
    if outside:
        raise ValueError(
            f"rollout.stop_token_ids: the model in {folder} has {size:,} tokens, so it can never "
            f"end with {', '.join(map(str, outside))}: correct it"
        )
    return StopRules(
        eos_token_ids=sorted(eos),
        more_token_ids=sorted(more - eos),
        texts=[text for text in rollout.stop if text not in added],
        keeps_stop=rollout.include_stop_str_in_output,
    )


def _eos_of(file: Path) -> set[int]:
    if not file.is_file():
        return set()
    return _as_set(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))


def _as_set(value: Any) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}
