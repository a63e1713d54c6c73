r"""A preprocessor: rows of a file as it is found -> prompts, and columns for rewards.

    rlsys data preview CONFIG.yaml --data.external_plugins plugins/word_problems.py \
        --data.preprocessor word_problems

It takes rows like {"question": "Tom has 3 ...", "answer": "3 + 4 = 7\n#### 7"}, in which the
answer ends with a number behind ####, as in GSM8K.
"""

from __future__ import annotations

from typing import Any

from rlsys.data import register_preprocessor

INSTRUCTION = "Solve the problem. Write your final answer, a number alone, between <answer> tags."


@register_preprocessor("word_problems")
def word_problems(row: dict[str, Any]) -> dict[str, Any] | None:
    """One row in, one row out; None leaves a row out, which the run counts and prints."""
    reasoning, mark, number = row["answer"].rpartition("####")
    if not mark:
        return None
    return {
        # Any row format of docs/data.md will do. Here: chat turns.
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": row["question"].strip()},
        ],
        # All other columns reach the rewards by name; `solution` is what most of them read.
        "solution": number.strip().replace(",", ""),
        "num_steps": len(reasoning.strip().splitlines()),
    }
