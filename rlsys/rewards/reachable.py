"""Can a completion earn what the rows promise? Checked before the first step, without a model.

Each reward function says which right answer it reads in a row (`gold`) and what a completion would
answer (`example`, see ORM). Completions are made of these answers in the usual layouts and scored
by the functions themselves, so what scores here scores in the run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rlsys.rewards.answers import without_warnings
from rlsys.rewards.base import TRL_PREFIX, orms
from rlsys.rewards.instances import Params, RewardError
from rlsys.rewards.scoring import Reward, is_async
from rlsys.types import OPEN_THINK, Completion, Prompt, RolloutGroup

MAX_ROWS = 100
"""Rows, spread over the data, for which completions are made up and scored."""
_LAYOUTS = (
    "<think>So</think>\n<answer>{answer}</answer>",
    "<think>So</think>\n\\boxed{{{answer}}}",
    "<think>So</think>\n<answer>\\boxed{{{answer}}}</answer>",
    "<think>So</think>\n{answer}",
    "So</think>\n<answer>{answer}</answer>",
    "So \\boxed{{{answer}}}",
    "So <answer>{answer}</answer>",
    "\\boxed{{{answer}}}",
    "<answer>{answer}</answer>",
    "{answer}",
)
_ROUNDING = 1e-6

GOLD_REMEDY = (
    "A right answer stands in the column answer, or marked in solution: <answer>42</answer>, "
    "\\boxed{42}, or #### 42 as the last line. Rename a column with data.columns, or write a "
    "data.preprocessor"
)
Write = Callable[[str], Completion]
"""Turns a text into a completion as in a run: its tokens, decoded again."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the reward functions read in one row, and the best completion that was made up."""

    golds: dict[str, str | None]
    """The right answer, by function that compares with one; None where it reads none."""
    completion: str | None
    """Decoded like in a run; None where no answer is known."""
    values: dict[str, float]
    """What `completion` earns; NaN for None."""
    best: dict[str, float]
    """The most that any completion earned from each function; NaN where all were None."""
    missed: list[str]
    """Functions from which no completion earned `max_reward`, though their answer is known."""


class ReachableRewards:
    """The reward functions of a run whose best value is known, and what rows let them give."""

    def __init__(
        self,
        functions: Iterable[str],
        params: Mapping[str, Params],
        run_values: Params,
        write: Write,
    ):
        """Instantiate them; async ones are left out.

        Raises:
            ValueError: settings that do not fit.
            RewardError: a class raised when it was instantiated.
        """
        functions = list(functions)
        made = [
            Reward(name, params.get(name), run_values)
            for name in functions
            if _max_reward(orms[name]) is not None and not is_async(orms[name])
        ]
        # An instance may know better than its class.
        self.rewards = [reward for reward in made if _max_reward(reward.function) is not None]
        known = [reward.name for reward in self.rewards]
        self.unknown = [name for name in functions if name not in known]
        """Functions whose best value is not known."""
        self._write = write
        self._layouts = list(_LAYOUTS)

    def golds(self, row: Mapping[str, Any]) -> dict[str, str | None]:
        """The right answer that each function reads; None without a usable one."""
        return {
            reward.name: _ask(gold, row)
            for reward in self.rewards
            if (gold := getattr(reward.function, "gold", None)) is not None
        }

    def look(self, prompt: Prompt) -> Look:
        """Make up completions until one earns the most from every function."""
        golds = self.golds(prompt.columns)
        asked = [reward for reward in self.rewards if golds.get(reward.name, "") is not None]
        answers = {reward.name: _answer(reward, prompt.columns, golds) for reward in asked}
        tried = list(dict.fromkeys(filter(None, answers.values())))
        best = {reward.name: math.nan for reward in asked}
        most, completion, earned = -1, None, dict[str, float]()
        for layout, answer in product(list(self._layouts), tried or ["..."]):
            text = layout.format(answer=answer)
            written = self._write(text.removeprefix(OPEN_THINK) if prompt.opens_think else text)
            values = _scores(asked, prompt, written)
            best = {name: _larger(best[name], values[name]) for name in best}
            num_earned = sum(_earns(reward, values) for reward in asked)
            if num_earned > most:
                most, completion, earned = num_earned, written.text, values
            if most == len(asked):
                # The next row most likely wants the same.
                self._layouts.sort(key=lambda other: other != layout)
                break
        missed = [
            reward.name
            for reward in asked
            if not _earns(reward, best) and answers[reward.name] is not None
        ]
        return Look(golds, completion if tried else None, earned if tried else {}, best, missed)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the right answers of many rows."""

    name: str
    """The reward function."""
    text: str
    in_all_rows: bool
    """Whether it is so in every row that was looked at."""
    kills_reward: bool
    """Whether the function then says None to every completion."""


_KINDS = {
    "absent": ("finds no right answer", True),
    "unreadable": ("says None to the right answer", True),
    "missed": ("gets its maximum from no completion tried", False),
}
"""What a function does in rows that are wrong, and whether it then says None."""


def look_at_rows(rewards: ReachableRewards, prompts: Sequence[Prompt]) -> list[Finding]:
    """What is wrong with right answers, by function and kind.

    All rows are asked for their right answers, `MAX_ROWS` of them for completions.
    """
    ids: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for prompt in prompts:
        for name, gold in rewards.golds(prompt.columns).items():
            if gold is None:
                ids[name, "absent"].append(prompt.prompt_id)
    looked = prompts[:: max(1, math.ceil(len(prompts) / MAX_ROWS))]
    for prompt in looked:
        look = rewards.look(prompt)
        for name in look.missed:
            unreadable = name in look.golds and math.isnan(look.best[name])
            ids[name, "unreadable" if unreadable else "missed"].append(prompt.prompt_id)
    findings = []
    for reward, (kind, (what, says_none)) in product(rewards.rewards, _KINDS.items()):
        name, found = reward.name, ids[reward.name, kind]
        rows = prompts if kind == "absent" else looked
        if found:
            looked_at = "rows" if len(rows) == len(prompts) else "rows looked at"
            count = f"{len(found):,} of {len(rows):,} {looked_at}"
            text = f"{name} {what} in {count} (first: {found[0]})"
            in_all = len(found) == len(rows)
            # TRL's functions take any number out of prose.
            kills = in_all and says_none and not name.startswith(TRL_PREFIX)
            findings.append(Finding(name, text, in_all, kills))
    return findings


def is_users_class(name: str) -> bool:
    """Whether a function is a class of a plugin, which may get `max_reward` and `gold`."""
    found = orms[name]
    return isinstance(found, type) and not found.__module__.startswith("rlsys.rewards.")


def _ask(function: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any]) -> str | None:
    """What `gold` or `example` returns; None for a row that it refuses or that lacks a column."""
    try:
        answer = function(row)
    except (ValueError, KeyError):
        return None
    return None if answer is None else str(answer)


def _answer(reward: Reward, row: Mapping[str, Any], golds: Mapping[str, str | None]) -> str | None:
    """What a completion would answer: "" if the function wants nothing particular, None if the
    answer is not known."""
    example = getattr(reward.function, "example", None)
    return golds.get(reward.name, "") if example is None else _ask(example, row)


def _scores(rewards: Sequence[Reward], prompt: Prompt, completion: Completion) -> dict[str, float]:
    group = RolloutGroup(0, prompt, [completion])
    values = {}
    with without_warnings():
        for reward in rewards:
            try:
                [values[reward.name]] = reward.score(group).values
            except RewardError:  # it refuses the row: `check_row` reports that
                values[reward.name] = math.nan
    return values


def _earns(reward: Reward, values: Mapping[str, float]) -> bool:
    most = _max_reward(reward.function)
    return most is not None and values[reward.name] >= most - _ROUNDING


def _max_reward(function: Any) -> float | None:
    return getattr(function, "max_reward", None)


def _larger(one: float, other: float) -> float:
    return other if math.isnan(one) else one if math.isnan(other) else max(one, other)
