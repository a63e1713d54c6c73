"""From sampled tokens to the text that rewards and people read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SkipSpecialTokens = bool | Literal["auto"]
_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


class Detokenizer:
    """Decodes completions as `rollout.skip_special_tokens` says."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip: SkipSpecialTokens,
        stop_token_ids: Collection[int] = (),
    ):
        """Sort the tokenizer's special tokens.

        Args:
            tokenizer: the model's.
            skip: the special tokens to leave out: all, none, or those with a role ("auto").
            stop_token_ids: tokens that end a completion, which is a role too.
        """
        self._tokenizer = tokenizer
        self._skips_all = skip is True
        roles = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
        self._left_out = {*roles, *stop_token_ids} if skip == "auto" else set()
        special = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and token_id not in {*roles, *stop_token_ids}
        }
        self.tags = [text for text in special.values() if _is_tag(text)]
        """Special tokens that look like tags, which rewards read: `<think>`, `</answer>`."""

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without the token that ended it."""
        kept = [token_id for token_id in token_ids if token_id not in self._left_out]
        decoded: Any = self._tokenizer.decode(kept, skip_special_tokens=self._skips_all)
        return str(decoded)

    def note(self) -> str | None:
        """Whether rewards see the tags, for the terminal; None without tags."""
        if not self.tags:
            return None
        shown = ", ".join(self.tags[:6]) + (", ..." if len(self.tags) > 6 else "")
        if self._skips_all:
            return (
                f"rewards and logs will not see {shown}: they are special tokens of this tokenizer "
                "and rollout.skip_special_tokens is true; auto keeps them"
            )
        return f"{shown} are special tokens of this tokenizer; rewards and logs see them"


def _is_tag(text: str) -> bool:
    """`<think>`, `</tool_call>` or `[THINK]`, not `<|im_start|>` or `<extra_id_0>`."""
    name = text[1:-1].removeprefix("/")
    brackets = text[:1] + text[-1:]
    return brackets in ("<>", "[]") and name.replace("_", "").isalpha()
