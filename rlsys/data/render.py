"""Chat turns to token ids: the one place where the chat template is applied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from rlsys.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of the rendered chat template, generation prompt included.

    `template_kwargs` are variables that the template reads, as of data.chat_template_kwargs.

    Raises:
        ValueError: the template refuses the messages.
    """
    try:
        return _render([messages], tokenizer, template_kwargs or {})[0]
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def render_prompts(
    conversations: list[list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
) -> list[list[int] | str]:
    """`render_prompt` of many, tokenised together; a text is what is wrong with that one."""
    try:
        return list(_render(conversations, tokenizer, template_kwargs))
    except jinja2.TemplateError:  # one of them: find out which
        return [_one(messages, tokenizer, template_kwargs) for messages in conversations]


def _one(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
) -> list[int] | str:
    try:
        return render_prompt(messages, tokenizer, template_kwargs)
    except ValueError as error:
        return str(error)


def _render(
    conversations: list[list[Message]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
) -> list[list[int]]:
    # Tokenised here and only here: templates write BOS themselves, a second pass through the
    # tokenizer would add another.
    token_ids: Any = tokenizer.apply_chat_template(
        conversations,
        **template_kwargs,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        # Or it warns of prompts over the model's length, which the limits of the config drop.
        tokenizer_kwargs={"verbose": False},
    )
    return token_ids


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot render.

    Raises:
        ValueError: it has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template, so messages cannot "
            "be rendered. Take an instruct model, or save a chat_template with the tokenizer."
        )
