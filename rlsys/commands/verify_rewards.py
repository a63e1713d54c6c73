"""Completions against the data and the reward functions: the prompts, and a sample scored again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rlsys.commands.data_preview import load_tokenizer
from rlsys.commands.verify_base import Checked, Difference, Finding, NotChecked, is_same
from rlsys.commands.verify_steps import Row, Steps, groups_of_steps, place_of
from rlsys.commands.verify_values import Prompts, scored_group
from rlsys.config import Config
from rlsys.config.gates import parse_gates
from rlsys.data.load import load_prompts
from rlsys.plugins.load import load_plugins
from rlsys.records import RunRecord
from rlsys.rewards.base import orms
from rlsys.rewards.builtin.judge import Judge
from rlsys.rewards.pool.scorer import GroupScorer, local_scorer
from rlsys.tracking.base import Split
from rlsys.tracking.completions import last_user_message
from rlsys.types import Prompt, RolloutGroup

WAIT_S = 0.2
KINDS: tuple[Split, ...] = ("train", "eval")


@dataclass(frozen=True, slots=True)
class Data:
    """The prompts of a run, read again."""

    train: dict[str, Prompt] = field(default_factory=dict)
    held_out: dict[str, Prompt] = field(default_factory=dict)
    problem: str | None = None
    """Why they could not be read."""

    def of(self, split: Split) -> Prompts:
        """The prompts of a kind of completions by their id."""
        return self.held_out if split == "eval" else self.train


def load_data(config: Config) -> Data:
    """Read the data of a run again, with its plugins and its tokenizer."""
    if config.data.streaming:
        return Data(problem="data.streaming: rows are not read again")
    try:
        load_plugins(config.plugins)
        loaded = load_prompts(config.data, load_tokenizer(config), seed=config.seed)
    except ValueError as error:
        return Data(problem=str(error).splitlines()[0])
    train, held_out = ({p.prompt_id: p for p in some} for some in (loaded.train, loaded.held_out))
    return Data(train, held_out)


def check_prompts(record: RunRecord, steps: Steps, data: Data) -> Iterator[Finding]:
    """Every completion answers a prompt of the data.

    Raises:
        Difference: one does not.
    """
    if data.problem is not None:
        yield NotChecked("prompts", f"the data cannot be read: {data.problem}")
        return
    count = 0
    for split in KINDS:
        for _, groups in groups_of_steps(record, split, steps.of(split)):
            for rows in groups:
                row, prompt = rows[0], data.of(split).get(rows[0]["prompt_id"])
                where = place_of(record, split, row) if prompt is None else ""
                if prompt is None:
                    raise Difference(where, "prompt_id", row["prompt_id"], "a row of the data")
                expected = last_user_message(prompt.messages)
                if row["prompt"] != expected:
                    where = place_of(record, split, row)
                    raise Difference(where, "prompt", row["prompt"], expected, "of the data")
                count += 1
    yield Checked("prompts", f"{count:,} of {count:,} groups stand in the data")


def check_scores(
    record: RunRecord, config: Config, steps: Steps, data: Data, sample: int | None
) -> Iterator[Finding]:
    """Score completions again, and compare.

    Args:
        sample: completions to score at least, spread over all steps; None is all.

    Raises:
        Difference: a function gives another value than was recorded, and the same twice.
    """
    if data.problem is not None:
        yield NotChecked("scores of completions", f"the data cannot be read: {data.problem}")
        return
    judged = {name for name in config.reward.names if _is_judged(config, name)}
    gates = parse_gates(config.reward.gate)
    judged |= {name for name, gate in gates.items() if gate.by in judged}
    for name in sorted(judged):
        yield NotChecked(f"scores of {name}", "they depend on a model, which may differ now")
    names = [name for name in config.reward.names if name not in judged]
    if not names:
        return
    try:
        scorer = _scorer(config, names)
    except (ValueError, RuntimeError) as error:
        yield NotChecked("scores of completions", str(error).splitlines()[0])
        return
    try:
        yield from _compare(record, config, steps, data, sample, names, scorer)
    finally:
        scorer.close()


def _compare(
    record: RunRecord,
    config: Config,
    steps: Steps,
    data: Data,
    sample: int | None,
    names: Sequence[str],
    scorer: GroupScorer,
) -> Iterator[Finding]:
    count, total, random = 0, 0, dict[str, int]()
    for split in KINDS:
        chosen = _spread(record, split, steps.of(split), sample)
        for _, groups in groups_of_steps(record, split, steps.of(split)):
            for rows in groups:
                total += len(rows)
                if (rows[0]["step"], rows[0]["group_id"]) not in chosen:
                    continue
                count += len(rows)
                group = scored_group(record, config, split, rows, data.of(split))
                for name in _different(record, split, rows, group, names, scorer):
                    random[name] = random.get(name, 0) + 1
    for name, number in random.items():
        why = f"it gives other values each time ({number} groups)"
        yield NotChecked(f"scores of {name}", why)
    fixed = ", ".join(name for name in names if name not in random)
    if fixed:
        yield Checked("scores", f"{count:,} of {total:,} completions again by {fixed}")


def _spread(
    record: RunRecord, split: Split, steps: list[int], sample: int | None
) -> set[tuple[int, int]]:
    """(step, group) of the groups to score: evenly spread over the steps, and within them."""
    places = [
        (step, rows[0]["group_id"], len(rows))
        for step, groups in groups_of_steps(record, split, steps)
        for rows in groups
    ]
    completions = sum(size for _, _, size in places)
    if sample is None or completions <= sample:
        return {(step, group) for step, group, _ in places}
    number = max(1, round(sample * len(places) / completions))
    # Off the grid of groups a step, so that not always the same group of a step is taken.
    taken = (places[int((i + 0.5) * len(places) / number)] for i in range(number))
    return {(step, group) for step, group, _ in taken}


def _different(
    record: RunRecord,
    split: Split,
    rows: Sequence[Row],
    group: RolloutGroup,
    names: Sequence[str],
    scorer: GroupScorer,
) -> Iterator[str]:
    """The functions that cannot be compared, because they give other values each time.

    Raises:
        Difference: a recorded value is another than the one that comes twice.
    """
    first = _score(scorer, group)
    again: RolloutGroup | None = None
    for index, row in enumerate(rows):
        for name in names:
            new = first.rewards[index]
            if name in new.failures or name in (row["failures"] or {}):
                continue
            recorded, value = row["rewards"][name], new.by_name[name]
            if is_same(recorded, value):
                continue
            again = again or _score(scorer, group)
            if not is_same(value, again.rewards[index].by_name[name]):
                yield name
                return
            shown = None if math.isnan(value) else value
            where = place_of(record, split, row)
            raise Difference(where, f"rewards.{name}", recorded, shown, "scored again")


def _score(scorer: GroupScorer, group: RolloutGroup) -> RolloutGroup:
    scorer.submit(replace(group, rewards=[]))
    while True:
        scorer.wait(WAIT_S)
        if scored := scorer.collect():
            return scored[0]


def _scorer(config: Config, names: Sequence[str]) -> GroupScorer:
    """A scorer of some of the run's functions."""
    reward = config.reward
    own = reward.model_copy(
        update={
            "reward_funcs": [name for name in reward.reward_funcs if name in names],
            "reward_model": [],
            "reward_weights": None,  # totals are not compared here
            "gate": {name: gate for name, gate in reward.gate.items() if name in names},
            "on_error": "drop",
            "on_timeout": "drop",
            "num_workers": 1,
        }
    )
    return local_scorer(
        own,
        config.run_values,
        plugins=config.data.external_plugins,
        max_steps=config.num_steps,
        in_run=False,
    )


def _is_judged(config: Config, name: str) -> bool:
    """Whether a model gives the scores of a function."""
    kind = orms[name]
    return name in config.reward.models or (isinstance(kind, type) and issubclass(kind, Judge))
