"""What follows from recorded completions: totals, advantages and metrics, by the run's own math."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlsys.algo.advantages import advantages_of_group, compute_advantages
from rlsys.algo.rollout_metrics import rollout_metrics
from rlsys.algo.weighting import leave_out
from rlsys.commands.verify_base import Checked, Difference, Finding, NotChecked, compare
from rlsys.commands.verify_steps import Row, Steps, check_batch, groups_of_steps, place_of
from rlsys.config import Config
from rlsys.records import RunRecord
from rlsys.rewards.pool.failures import FailurePolicy
from rlsys.rollout.evaluation import metrics_of_sets
from rlsys.tracking.base import Split
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup, TrainBatch

OF_PROMPTS = ("num_prompt_tokens", "maj@")
"""Metrics that need the prompts themselves."""
CHECKED_ELSEWHERE = {"policy_version", "staleness/mean", "staleness/max"}
Prompts = Mapping[str, Prompt]


def check_training(
    record: RunRecord, config: Config, steps: Steps, prompts: Prompts
) -> Iterator[Finding]:
    """Completions of training steps: counts, versions, totals, advantages, and the step's metrics.

    Raises:
        Difference: the first one.
    """
    counts, names, lacking = Counter[str](), Counter[str](), 0
    for step, groups in groups_of_steps(record, "train", steps.of("train")):
        metrics = steps.training[step]
        check_batch(record, config, step, groups, metrics)
        scored = [scored_group(record, config, "train", rows, prompts) for rows in groups]
        for rows, group in zip(groups, scored, strict=True):
            counts["completions"] += len(rows)
            counts["advantages"] += _check_advantages(record, config, "train", rows, group)
        lacking += any(group.prompt.prompt_id not in prompts for group in scored)
        expected = _step_metrics(config, scored, known=not lacking)
        names.update(compare(record.run.metrics, step, metrics, expected, "from completions"))
    total = counts["completions"]
    yield Checked("completions", f"{total:,}, each once, of {len(steps.training):,} steps")
    yield Checked("versions and staleness", f"{total:,} of {total:,} completions")
    yield Checked("total rewards", f"{total:,} of {total:,} from the rewards by name")
    if counts["advantages"]:
        yield Checked("advantages", f"{counts['advantages']:,} of {total:,}")
    else:
        yield NotChecked("advantages of completions", "they depend on the whole batch or on the KL")
    values = sum(names.values())
    yield Checked("metrics of steps", f"{values:,} values of {len(names)} metrics")
    seen = {n for row in steps.training.values() for n, v in row.items() if not isinstance(v, str)}
    others = sorted(seen - set(names) - CHECKED_ELSEWHERE)
    yield NotChecked(f"{len(others)} other metrics", f"{_some(others)}: they need models or clocks")


def check_filtered(record: RunRecord, config: Config, steps: Steps) -> Iterator[Finding]:
    """Groups that dynamic sampling left out.

    Raises:
        Difference: the first one.
    """
    if not config.rollout.dynamic_sample:
        return
    count = 0
    for step, groups in groups_of_steps(record, "filtered", steps.of("filtered")):
        recorded = steps.training[step].get("dynamic_sample/groups_filtered", len(groups))
        if recorded != len(groups):
            text = f"groups of step {step}"
            raise Difference(record.run.filtered_completions.name, text, len(groups), int(recorded))
        for rows in groups:
            group = scored_group(record, config, "filtered", rows, {})
            _check_advantages(record, config, "filtered", rows, group)
            count += len(rows)
    yield Checked("filtered completions", f"{count:,}")


def check_evaluations(
    record: RunRecord, config: Config, steps: Steps, prompts: Prompts
) -> Iterator[Finding]:
    """Held-out completions: totals, versions, and the metrics of their evaluation.

    Raises:
        Difference: the first one.
    """
    if not steps.evaluations:
        return
    count, values, sizes = 0, 0, set[int]()
    for step, groups in groups_of_steps(record, "eval", steps.of("eval")):
        scored = [scored_group(record, config, "eval", rows, prompts) for rows in groups]
        for rows in groups:
            for row in rows:
                if row["policy_versions"] != [step]:
                    where, versions = place_of(record, "eval", row), row["policy_versions"]
                    raise Difference(where, "policy_versions", versions, [step])
        count += sum(map(len, groups))
        sizes.add(len(groups))
        if len(sizes) > 1:
            text = f"prompts of the evaluation after step {step}"
            others = sorted(sizes - {len(groups)})[0]
            raise Difference(record.run.eval_completions.name, text, len(groups), others)
        if not config.data.val_sets:
            known = all(group.prompt.prompt_id in prompts for group in scored)
            expected = _without(metrics_of_sets(config, {"": scored}), known=known)
            row = steps.evaluations[step]
            why = "from eval_completions"
            values += len(list(compare(record.run.metrics, step, row, expected, why)))
    yield Checked(
        "held-out completions", f"{count:,}, each once, of {len(steps.evaluations)} evaluations"
    )
    if config.data.val_sets:
        why = "with data.val_sets, the set of a completion is not recorded"
        yield NotChecked("metrics of evaluations", why)
    else:
        yield Checked("metrics of evaluations", f"{values:,} values")


def scored_group(
    record: RunRecord, config: Config, split: Split, rows: Sequence[Row], prompts: Prompts
) -> RolloutGroup:
    """The group that rows were written of, after checking their totals."""
    for row in rows:
        _check_total(record, config, split, row)
    names = config.reward.names
    first = rows[0]
    unknown = Prompt(first["prompt_id"], [], [0])
    return RolloutGroup(
        ticket=0,
        group_id=first["group_id"],
        prompt=prompts.get(first["prompt_id"], unknown),
        completions=[
            Completion(
                token_ids=list(range(row["num_tokens"])),
                rollout_logprobs=[0.0] * row["num_tokens"],
                text=row["text"],
                finish_reason=row["finish_reason"],
                policy_versions=tuple(row["policy_versions"]),
            )
            for row in rows
        ],
        rewards=[
            RewardOutput(
                _number(row["reward"]),
                {name: _number(row["rewards"][name]) for name in names},
                row["failures"] or {},
            )
            for row in rows
        ],
    )


def _check_total(record: RunRecord, config: Config, split: Split, row: Row) -> None:
    names, rewards, total = config.reward.names, row["rewards"], row["reward"]
    if set(rewards) != set(names):
        where = place_of(record, split, row)
        raise Difference(where, "rewards", ", ".join(rewards), ", ".join(names), "reward_funcs")
    policy = FailurePolicy(config.reward, in_run=False)
    dropped = any(policy.choose(kind) == "drop" for kind in (row["failures"] or {}).values())
    weights = config.reward.reward_weights or [1.0] * len(names)
    values = [_number(rewards[name]) for name in names]
    terms = [w * v for w, v in zip(weights, values, strict=True) if not math.isnan(v)]
    if dropped or not terms:
        if total is not None:
            raise Difference(place_of(record, split, row), "reward", total, None, "dropped")
        return
    # Python 3.12 sums floats more exactly than 3.11.
    plain = 0.0
    for term in terms:
        plain += term
    if total not in (plain, sum(terms), math.fsum(terms)):
        where = place_of(record, split, row)
        raise Difference(where, "reward", total, plain, f"rewards {rewards}, weights {weights}")


def _check_advantages(
    record: RunRecord, config: Config, split: Split, rows: Sequence[Row], group: RolloutGroup
) -> int:
    """Compare the advantages of a group; returns how many there were to compare."""
    expected = advantages_of_group(group, config.grpo, config.reward.reward_weights)
    for index, row in enumerate(rows):
        recorded, value = row["advantage"], None if expected is None else expected[index]
        if (recorded is None) != (value is None) or (
            value is not None and not _same_float32(recorded, value)
        ):
            where = place_of(record, split, row)
            raise Difference(where, "advantage", recorded, value, "from the rewards of its group")
    return 0 if expected is None else len(rows)


def _same_float32(recorded: float, expected: float) -> bool:
    """Whether both are the same number of 32 bits, or neighbours: versions round differently."""
    one, other = np.float32(recorded), np.float32(expected)
    return float(one) == recorded and bool(abs(one - other) <= np.spacing(abs(other)))


def _step_metrics(config: Config, groups: list[RolloutGroup], *, known: bool) -> dict[str, float]:
    """What a step logs about its completions."""
    batch = _batch(groups)
    need_logprobs = config.grpo.advantages_need_logprobs
    if not need_logprobs:
        weights = config.reward.reward_weights
        batch.advantages = compute_advantages(groups, batch, config.grpo, weights)
    mask_truncated = config.grpo.mask_truncated_completions
    leave_out(batch, groups, mask_truncated_completions=mask_truncated)
    metrics = _without(rollout_metrics(groups, batch), known=known)
    return {n: v for n, v in metrics.items() if not (need_logprobs and n.startswith("advantages/"))}


def _batch(groups: list[RolloutGroup]) -> TrainBatch:
    """The tokens of completions, which are all that advantages look at."""
    completions = [completion for group in groups for completion in group.completions]
    lengths_N = torch.tensor([len(completion.token_ids) for completion in completions])
    mask_NS = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    zeros_NS = torch.zeros(mask_NS.shape)
    return TrainBatch(zeros_NS.long(), lengths_N, mask_NS, zeros_NS, zeros_NS.clone())


def _without(metrics: dict[str, float], *, known: bool) -> dict[str, float]:
    """Metrics without those that need prompts, unless these are known."""
    return {n: v for n, v in metrics.items() if known or not any(part in n for part in OF_PROMPTS)}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _some(names: list[str]) -> str:
    shown = [name for name in names if "time" not in name and "/" not in name][:4] or names[:4]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
