"""The rows of completions.jsonl, and their columns."""

from __future__ import annotations

from typing import Any

from rlsys.types import Message, RolloutGroup

ABOUT_COMPLETION = {
    *("step", "group_id", "index", "group_size", "prompt_id", "reward", "rewards", "failures"),
    *("advantage", "num_tokens", "finish_reason", "policy_versions", "version_starts"),
    "extra_columns",
}
"""What a row says about its completion: not `prompt` and `text`, and no column of a data set."""


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


def last_user_message(messages: list[Message]) -> str:
    """The text of the last user turn, or of the last turn if no turn is a user's."""
    asked = [message for message in messages if message["role"] == "user"] or messages
    content = asked[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
