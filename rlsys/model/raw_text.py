"""Prompts as plain text, without a chat template: for base models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RawText:
    """How a tokenizer writes plain text."""

    tokenizer: PreTrainedTokenizerBase
    before: list[int]
    """Special tokens that it puts before a text, BOS in Llama's."""
    after: list[int]
    """Special tokens that it puts behind a text; prompts do not get them, since the completion
    continues the text."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RawText:
        """Find out with a probe."""
        probe: Any = "a"
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        starts = [n for n in range(len(whole)) if whole[n : n + len(bare)] == bare]
        start = starts[0] if starts else 0
        return cls(tokenizer, whole[:start], whole[start + len(bare) :] if starts else [])

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts, with `before`, unless the text itself begins with it."""
        # Not verbose: the limits of the config drop prompts over the model's length.
        options = {"add_special_tokens": False, "verbose": False}
        encoded = self.tokenizer(texts, **options)["input_ids"] if texts else []
        size = len(self.before)
        return [ids if ids[:size] == self.before else self.before + ids for ids in encoded]
