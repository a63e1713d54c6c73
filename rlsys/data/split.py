"""Hold out prompts for evaluation."""

from __future__ import annotations

import random
from collections import Counter

from rlsys.text import counted
from rlsys.types import Prompt


def split_prompts(
    prompts: list[Prompt], ratio: float, *, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Split into training and validation, each in the given order; `ratio` goes to validation.

    Rows with the same rendered prompt stay together, so no prompt is both trained and evaluated on.

    Raises:
        ValueError: one of the two would be empty.
    """
    if ratio == 0.0:
        return prompts, []
    wanted = max(1, round(ratio * len(prompts)))
    texts = Counter(tuple(prompt.token_ids) for prompt in prompts)
    order = list(texts)
    random.Random(seed).shuffle(order)
    held_out: set[tuple[int, ...]] = set()
    num_held_out = 0
    while num_held_out < wanted and order:
        text = order.pop()
        held_out.add(text)
        num_held_out += texts[text]
    if not order:
        raise ValueError(
            f"data.split_dataset_ratio = {ratio} leaves nothing to train on: "
            f"{counted(len(prompts), 'row')} with {counted(len(texts), 'different prompt')}. Give "
            "more rows or a val_dataset."
        )
    return (
        [prompt for prompt in prompts if tuple(prompt.token_ids) not in held_out],
        [prompt for prompt in prompts if tuple(prompt.token_ids) in held_out],
    )


def texts_of(prompts: list[Prompt]) -> set[tuple[int, ...]]:
    """The different rendered prompts."""
    return {tuple(prompt.token_ids) for prompt in prompts}
