"""The rows of completions.jsonl, and their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlsys.types import Message, RolloutGroup

ABOUT_COMPLETION = {
    *("step", "group_id", "index", "group_size", "prompt_id", "reward", "rewards", "failures"),
    *("advantage", "num_tokens", "finish_reason", "policy_versions", "version_starts"),
    "extra_columns",
}
"""What a row says about its completion: not `prompt` and `text`, and no column of a data set."""

STEPS_BETWEEN_TEXTS = 10
"""Trackers that show texts keep few of them, or write a file for each; completions.jsonl has
all."""


def is_shown_as_text(step: int, group: RolloutGroup) -> bool:
    """Whether a tracker that shows texts takes this group: the first one of every tenth step."""
    return group.group_id == 0 and step % STEPS_BETWEEN_TEXTS == 0


def completion_rows(
    step: int, group: RolloutGroup, advantages: list[float] | None
) -> list[dict[str, Any]]:
    """One row for each completion of a group; docs/debugging.md explains the columns."""
    size = len(group.completions)
    assert len(group.rewards) in (0, size), "a group is scored as a whole"
    assert advantages is None or len(advantages) == size
    prompt = last_user_message(group.prompt.messages)
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "group_id": group.group_id,
            "index": index,
            "group_size": size,
            "prompt_id": group.prompt.prompt_id,
            "reward": group.rewards[index].total if group.rewards else None,
            "rewards": group.rewards[index].by_name if group.rewards else {},
            "failures": group.rewards[index].failures if group.rewards else {},
            "advantage": None if advantages is None else advantages[index],
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "policy_versions": completion.policy_versions,
            "version_starts": completion.version_starts,
            "prompt": prompt,
            "text": completion.text,
        }
        for index, completion in enumerate(group.completions)
    ]
    for row, reward in zip(rows, group.rewards, strict=False):
        if reward.extra:
            # A column of rewards must not replace one of the row.
            extra = {f"logged/{n}" if n in row else n: v for n, v in reward.extra.items()}
            row |= extra | {"extra_columns": list(extra)}
    return rows


def row_problem(row: Mapping[str, Any]) -> str | None:
    """Why an object is not a row of `completion_rows`; None if it is."""
    lacking = [name for name in _HOLDS if name not in row and name not in OLD_RUNS_LACK]
    if lacking:
        return f"it has no {lacking[0]!r}"
    for name, (what, fits) in _HOLDS.items():
        if name in row and not fits(row[name]):
            return f"{name!r} is {row[name]!r:.40}, not {what}"
    return None


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0, of a size that a run has."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_one and abs(value) < 1e100)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_versions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_count, value))


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_COUNT = ("a whole number", is_count)
_NUMBER = ("a number or null", _is_number)
_TEXT = ("a text", _is_text)
_VERSIONS = ("a list of whole numbers", _are_versions)
_HOLDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("step", "group_id", "index", "group_size", "num_tokens"), _COUNT),
    **dict.fromkeys(("prompt_id", "finish_reason", "prompt", "text"), _TEXT),
    **dict.fromkeys(("reward", "advantage"), _NUMBER),
    **dict.fromkeys(("policy_versions", "version_starts"), _VERSIONS),
    "rewards": ("numbers by name", _by_name(_is_number)),
    "failures": ("texts by name", _by_name(_is_text)),
}
"""Column -> what it holds, in words and as a check."""
OLD_RUNS_LACK = ("failures", "version_starts")
"""Columns that the first versions of rlsys did not write."""


def last_user_message(messages: list[Message]) -> str:
    """The text of the last user turn, or of the last turn if no turn is a user's."""
    asked = [message for message in messages if message["role"] == "user"] or messages
    content = asked[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
