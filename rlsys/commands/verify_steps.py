"""The steps of a run: none is missing or twice, in metrics and in completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlsys.commands.verify_base import Checked, Difference, Finding, line_of
from rlsys.config import Config, RunConfig
from rlsys.exit_codes import DONE
from rlsys.records import Query, RunRecord
from rlsys.records.columns import STORED
from rlsys.records.rows import Rows
from rlsys.tracking.base import Split, is_evaluation

Row = dict[str, Any]
STEPS_AT_ONCE = 16
"""Steps whose completions are in memory together."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The rows of metrics.jsonl."""

    training: dict[int, Row]
    evaluations: dict[int, Row]

    def of(self, split: Split) -> list[int]:
        """The steps that have completions of a kind, in order."""
        return sorted(self.evaluations if split == "eval" else self.training)

    @property
    def last(self) -> int:
        """The last training step; 0 before the first."""
        return max(self.training, default=0)


def read_steps(record: RunRecord) -> Steps:
    """All rows of metrics.jsonl.

    Raises:
        Difference: a step is there twice, or has no number.
    """
    steps = Steps({}, {})
    for row in Rows(record.run.metrics).read():
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise Difference(record.run.metrics.name, "step", step, "a whole number")
        values = {name: value for name, value in row.items() if name != "step"}
        found = steps.evaluations if is_evaluation(values) else steps.training
        if step in found:
            count = 2 + (step in steps.training and step in steps.evaluations)
            where = line_of(record.run.metrics, count, step=step)
            raise Difference(where, "step", step, step + 1, "this step has a row already")
        found[step] = values
    return steps


def check_steps(record: RunRecord, config: RunConfig | None, steps: Steps) -> Iterator[Finding]:
    """Training steps follow each other up to the last one, and evaluations are due."""
    metrics = record.run.metrics
    for expected, (step, row) in enumerate(steps.training.items(), start=1):
        if step != expected:
            raise Difference(line_of(metrics, step=step), "step", step, expected, "steps missing")
        if row.get("policy_version", step) != step:
            version = row["policy_version"]
            raise Difference(line_of(metrics, step=step), "policy_version", version, step)
    status = record.status
    total = None if config is None else config.max_steps
    if status.exit_code == DONE and total is not None and steps.last != total:
        raise Difference(metrics.name, "last step", steps.last, total, "ended.json: done")
    yield Checked("steps", f"{len(steps.training):,} follow each other, each once")
    if config is None or config.eval_steps is None:
        return
    due = {0, *range(config.eval_steps, steps.last + 1, config.eval_steps)}
    going = status.exit_code != DONE
    for step in sorted(due ^ set(steps.evaluations)):
        if not (going and step == steps.last):  # it may have stopped before its evaluation
            is_there = step in steps.evaluations
            where = line_of(metrics, step=step) if is_there else metrics.name
            what = f"evaluations after step {step}"
            raise Difference(where, what, int(is_there), int(not is_there))
    yield Checked("evaluations", f"{len(steps.evaluations):,} at the steps of eval_steps")


def groups_of_steps(
    record: RunRecord, split: Split, steps: list[int]
) -> Iterator[tuple[int, list[list[Row]]]]:
    """Each step with its groups by number; a group is its rows by index.

    Raises:
        Difference: a completion is there twice or missing.
    """
    completions = record.completions(split)
    for start in range(0, len(steps), STEPS_AT_ONCE):
        some = steps[start : start + STEPS_AT_ONCE]
        query = Query(steps=(some[0], some[-1]), descending=False, columns=list(STORED))
        by_step: dict[int, list[Row]] = {step: [] for step in some}
        for row in completions.query(query).rows:
            by_step.setdefault(row["step"], []).append(row)
        for step in some:
            yield step, _groups(record, split, by_step[step])


def _groups(record: RunRecord, split: Split, rows: list[Row]) -> list[list[Row]]:
    path, found = record.run.completions_of(split), dict[int, dict[int, Row]]()
    for row in rows:
        group = found.setdefault(row["group_id"], {})
        if row["index"] in group:
            where = line_of(path, 2, **_key(row))
            text = f"{row['group_id']}, {row['index']}"
            raise Difference(where, "group_id, index", text, "another", "it is there twice")
        group[row["index"]] = row
    groups = []
    for group in (found[number] for number in sorted(found)):
        first = next(iter(group.values()))
        size = first["group_size"]
        for index in range(size):
            if index not in group:
                where = line_of(path, step=first["step"], group_id=first["group_id"])
                text = f"completions of group {first['group_id']} of step {first['step']}"
                raise Difference(where, text, len(group), size, f"index {index} is missing")
        for row in group.values():
            for name in ("prompt_id", "prompt", "group_size"):
                if row[name] != first[name]:
                    raise Difference(line_of(path, **_key(row)), name, row[name], first[name])
        groups.append([group[index] for index in sorted(group)])
    return groups


def _key(row: Row) -> Row:
    return {name: row[name] for name in ("step", "group_id", "index")}


def place_of(record: RunRecord, split: Split, row: Row) -> str:
    """File and line of a completion."""
    return line_of(record.run.completions_of(split), **_key(row))


def check_batch(
    record: RunRecord, config: Config, step: int, groups: list[list[Row]], metrics: Row
) -> None:
    """A step has all its groups, sampled by versions that it may train on.

    Raises:
        Difference: it has not.
    """
    path = record.run.completions
    numbers = Counter(group[0]["group_id"] for group in groups)
    expected = range(config.num_prompts)
    for number in expected:
        if number not in numbers:
            text = f"groups of step {step}"
            why = f"group {number} is missing"
            raise Difference(line_of(path, step=step), text, len(groups), len(expected), why)
    if len(groups) != len(expected):
        raise Difference(line_of(path, step=step), "groups", len(groups), len(expected))
    for group in groups:
        for row in group:
            if row["group_size"] != config.rollout.num_generations:
                where, size = place_of(record, "train", row), config.rollout.num_generations
                raise Difference(where, "group_size", row["group_size"], size)
            _check_versions(record, config, step, row)
    stale = [step - 1 - row["policy_versions"][0] for group in groups for row in group]
    for name, value in (("mean", sum(stale) / len(stale)), ("max", max(stale))):
        recorded = metrics.get(f"staleness/{name}", value)
        if abs(recorded - value) > 1e-9:
            where = line_of(record.run.metrics, step=step)
            why = "of policy_versions in completions"
            raise Difference(where, f"staleness/{name}", recorded, value, why)


def _check_versions(record: RunRecord, config: Config, step: int, row: Row) -> None:
    versions, starts = row["policy_versions"], row["version_starts"]
    bound = config.rollout.max_staleness
    oldest = step - 1 - bound
    if not versions or versions != sorted(set(versions)):
        where = place_of(record, "train", row)
        raise Difference(where, "policy_versions", versions, "versions that rise")
    if versions[0] < oldest or versions[-1] > step - 1:
        where = place_of(record, "train", row)
        why = f"rollout.max_staleness = {bound}"
        expected = f"{oldest} to {step - 1}" if bound else [step - 1]
        raise Difference(where, "policy_versions", versions, expected, why)
    if starts and (len(starts) != len(versions) or starts != sorted(set(starts)) or starts[0]):
        raise Difference(place_of(record, "train", row), "version_starts", starts, "from 0, rising")
