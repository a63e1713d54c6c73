"""What ends a completion: EOS tokens of the model's files, and what the config adds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlsys.config import RolloutConfig
from rlsys.model.folder import read_json
from rlsys.model.tokenizer_files import eos_token_ids


@dataclass(frozen=True, slots=True)
class StopRules:
    """Everything that ends a completion, besides the length limit."""

    eos_token_ids: list[int]
    """EOS tokens of the model folder."""
    more_token_ids: list[int]
    """Tokens of rollout.stop_token_ids, and texts of rollout.stop that are added tokens."""
    texts: list[str]
    """Texts of rollout.stop that may span several tokens."""
    keeps_stop: bool
    """Whether the token or text of the config that ended a completion stays in its text."""

    @property
    def token_ids(self) -> list[int]:
        """All tokens that end a completion, in ascending order."""
        return sorted({*self.eos_token_ids, *self.more_token_ids})

    def tokens_of_text(self, token_ids: list[int]) -> list[int]:
        """The tokens of a completion's text: without the last one, unless that is to stay."""
        last = token_ids[-1]
        ends = last in self.eos_token_ids or (last in self.more_token_ids and not self.keeps_stop)
        return token_ids[:-1] if ends else token_ids

    def cut(self, text: str) -> str:
        """`text` up to the first of `texts`, which the last token may go beyond."""
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
        ValueError: only the length limit ends a completion, or the model lacks a stop token.
    """
    eos: set[int] = {token_id for _, token_id in eos_token_ids(folder)}
    if tokenizer.eos_token_id is not None:
        eos.add(tokenizer.eos_token_id)
    added = tokenizer.get_added_vocab()
    more = {*rollout.stop_token_ids, *(added[text] for text in rollout.stop if text in added)}
    if not (eos or more or rollout.stop):
        raise ValueError(
            f"no end-of-sequence token is known for the model in {folder}: neither "
            "generation_config.json nor config.json has eos_token_id, and the tokenizer has no "
            "eos_token. Set rollout.stop_token_ids or rollout.stop."
        )
    size = read_json(folder / "config.json").get("vocab_size")
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
