"""From characters to tokens: which tokens of a text are the targets."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlsys.json_text import BadRow
from rlsys.model.answer_spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINKING = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)
_SPACE_SIGNS = ("\u0120", "\u2581")
"""What tokens begin with that have a space before their word, in byte-level BPE and Unigram."""


def without_thinking(text: str, span: Span, *, only_empty: bool) -> Span:
    """The span of an answer behind its thinking, or behind empty thinking only."""
    start, end = span
    found = _THINKING.match(text, start, end)
    if found is None or (only_empty and found.group(1).strip()):
        return span
    begins_inside = text[:start].rstrip().endswith("<think>")
    if not begins_inside and not text[start:end].lstrip().startswith("<think>"):
        return span
    return found.end(), end


def target_mask(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    token_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[Span],
) -> np.ndarray:
    """[T] bool, True on the tokens of `spans`.

    White space at the edges of a span may share a token with what is outside: with the header, then
    the token is not a target; with the end of the turn, then it is one.

    Args:
        tokenizer: made the tokens.
        text: of the tokens.
        token_ids: [T].
        offsets: [T] first character of each token, and the one behind its last.
        spans: of characters, ascending.

    Raises:
        BadRow: a token is partly inside a span, or the tokens of a span are another text.
    """
    bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = bounds[:, 0], bounds[:, 1]
    mask = np.zeros(len(token_ids), dtype=np.bool_)
    for start, end in spans:
        inside = (starts >= start) & (starts < end) & (ends > start)
        across = (starts < start) & (ends > start)
        for token in np.flatnonzero(across):
            if text[start : ends[token]].strip():
                raise _split_token(text, (starts[token], ends[token]), start)
        run = np.flatnonzero(inside)
        if not len(run):
            continue
        last = ends[run[-1]]
        if last > end and text[end:last].strip():
            raise _split_token(text, (starts[run[-1]], last), end)
        _check_first(tokenizer, text, token_ids, bounds, int(run[0]), start)
        _check_text(tokenizer, text, token_ids, run, (start, end))
        mask |= inside
    return mask


def _check_first(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    token_ids: Sequence[int],
    bounds: np.ndarray,
    token: int,
    start: int,
) -> None:
    """Refuse a first token with a space that belongs to the text before the span.

    Byte-level tokenizers do not count such a space among the characters of the token.
    """
    before = int(bounds[token - 1, 1]) if token else 0
    if before >= start or bounds[token, 0] < start:
        return
    piece: Any = tokenizer.convert_ids_to_tokens(token_ids[token])
    if piece.startswith(_SPACE_SIGNS) and text[before : bounds[token, 0]].strip() == "":
        raise _split_token(text, (before, int(bounds[token, 1])), start)


def _check_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    token_ids: Sequence[int],
    run: np.ndarray,
    span: Span,
) -> None:
    """Refuse targets that are another text than the span, white space and letter forms aside."""
    ids = [token_ids[token] for token in run]
    if tokenizer.unk_token_id in ids:
        return
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    decoded: Any = tokenizer.decode(ids, **options)
    expected = text[span[0] : span[1]]
    if _letters(decoded) != _letters(expected):
        raise BadRow(
            "the tokens to train on are another text than the answer: "
            f"{decoded!r:.60} instead of {expected!r:.60}"
        )


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split()).casefold()


def _split_token(text: str, token: tuple[int, int], edge: int) -> BadRow:
    start, end = token
    return BadRow(
        f"the token {text[start:end]!r} is partly trained on: {text[start:edge]!r} and "
        f"{text[edge:end]!r} became one token, so the loss cannot be placed exactly. Change the "
        "row (white space at its edges, mostly), or the chat template"
    )
