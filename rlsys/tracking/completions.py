"""completions.jsonl: every completion of a batch, with its rewards, written before the update."""

from __future__ import annotations

from typing import Any

from rlsys.run.folder import RunDir
from rlsys.tracking.base import Split, Tracker
from rlsys.tracking.jsonl import JsonlWriter
from rlsys.types import Message, RolloutGroup

ABOUT_COMPLETION = {
    *("step", "group_id", "index", "group_size", "prompt_id", "reward", "rewards", "failures"),
    *("advantage", "num_tokens", "finish_reason", "policy_versions", "version_starts"),
    "extra_columns",
}
"""Of a row: all but `prompt` and `text`, and no columns of a dataset."""


class CompletionsTracker(Tracker):
    """completions.jsonl, and files of their own for held-out and for filtered groups."""

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir
        self._writers: dict[Split, JsonlWriter] = {"train": JsonlWriter(run_dir.completions)}

    def log_completions(
        self,
        step: int,
        group: RolloutGroup,
        advantages: list[float] | None,
        split: Split = "train",
    ) -> None:
        """Append the G completions of a group together."""
        if split not in self._writers:
            self._writers[split] = JsonlWriter(self._run_dir.completions_of(split))
        self._writers[split].append(*completion_rows(step, group, advantages))

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


def completion_rows(
    step: int, group: RolloutGroup, advantages: list[float] | None
) -> list[dict[str, Any]]:
    """One row a completion; docs/debugging.md explains the columns."""
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
            # A name that the row has already gets another one.
            extra = {f"logged/{n}" if n in row else n: v for n, v in reward.extra.items()}
            row |= extra | {"extra_columns": list(extra)}
    return rows


def last_user_message(messages: list[Message]) -> str:
    """What was asked: the text of the last user turn, or of the last turn when there is none."""
    asked = [message for message in messages if message["role"] == "user"] or messages
    content = asked[-1]["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
