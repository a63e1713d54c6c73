"""One evaluation: held-out prompts, their scored completions, and what they say about a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rlsys.algo.evaluation import Estimate, estimate, majority_vote, pass_at_k
from rlsys.algo.rollout_metrics import evaluation_metrics, logged_metrics
from rlsys.config import Config
from rlsys.rewards.answers import marked_answer
from rlsys.rollout.draws import sampling_seed
from rlsys.types import OPEN_THINK, Prompt, RolloutGroup, SampleRequest

Key = tuple[str, int]
"""The set of a prompt, "" for data.val_dataset, and its place in the set."""


class Evaluation:
    """The groups of one evaluation while they are sampled and scored.

    Args:
        config: says how held-out prompts are sampled.
        sets: the prompts by the name of their set.
        tickets: numbers that no other group in flight has.
    """

    def __init__(
        self, config: Config, sets: Mapping[str, Sequence[Prompt]], tickets: Iterator[int]
    ):
        self._config = config
        self._sets = sets
        self._keys: dict[int, Key] = {
            next(tickets): (name, place)
            for name, prompts in sets.items()
            for place in range(len(prompts))
        }
        self._numbers = {ticket: number for number, ticket in enumerate(self._keys)}
        self._groups: dict[Key, RolloutGroup] = {}

    @property
    def total(self) -> int:
        """Groups in all."""
        return len(self._keys)

    @property
    def done(self) -> int:
        """Groups that `take` has got."""
        return len(self._groups)

    def requests(self) -> list[SampleRequest]:
        """What to sample. The seeds depend on config.seed and the place of a prompt in its set
        only, so that two evaluations differ by their weights."""
        config, rollout, own = self._config, self._config.rollout, self._config.eval
        requests = []
        for ticket, (name, place) in self._keys.items():
            # The set without a name keeps the seeds that it has always had.
            key = (0, place) if not name else (0, place, *name.encode())
            requests.append(
                SampleRequest(
                    ticket,
                    self._sets[name][place],
                    own.num_generations,
                    rollout.temperature if own.temperature is None else own.temperature,
                    sampling_seed(config.seed, *key) if rollout.seed_per_request else None,
                    own.top_p,
                    own.top_k,
                )
            )
        return requests

    def take(self, group: RolloutGroup) -> RolloutGroup | None:
        """A scored group with its number in the evaluation; None if it is not of this one."""
        if group.ticket not in self._keys:
            return None
        numbered = replace(group, group_id=self._numbers[group.ticket])
        self._groups[self._keys[group.ticket]] = numbered
        return numbered

    def groups(self) -> dict[str, list[RolloutGroup]]:
        """The scored groups of each set, in the order of its prompts.

        Raises:
            RuntimeError: they were sampled with several weight versions.
        """
        versions = {c.policy_versions for group in self._groups.values() for c in group.completions}
        if len(versions) > 1:
            raise RuntimeError(f"an evaluation has several weight versions: {versions}")
        return {
            name: [self._groups[name, place] for place in range(len(prompts))]
            for name, prompts in self._sets.items()
        }


def metrics_of_sets(
    config: Config, groups_of: Mapping[str, list[RolloutGroup]]
) -> dict[str, float]:
    """The metrics of an evaluation, as eval/<key> and eval/<set>/<key>; see docs/metrics.md."""
    found: dict[str, float] = {}
    for name, groups in groups_of.items():
        metrics = evaluation_metrics(groups)
        if config.eval.num_generations > 1:
            metrics |= {key: one.mean for key, one in score_estimates(config, groups).items()}
            for key, one in reward_estimates(groups).items():
                metrics[f"{key.removesuffix('/mean')}_stderr"] = one.stderr
        metrics |= logged_metrics(groups, beside=metrics)
        prefix = f"eval/{name}/" if name else "eval/"
        found |= {prefix + key: value for key, value in metrics.items()}
    return found


def reward_estimates(groups: Sequence[RolloutGroup]) -> dict[str, Estimate]:
    """The mean of the total reward and of each reward function, by the key of the metric."""
    names = list(groups[0].rewards[0].by_name) if groups else []
    found = {"reward": estimate([[reward.total for reward in group.rewards] for group in groups])}
    for name in names:
        values = [[reward.by_name[name] for reward in group.rewards] for group in groups]
        found[f"rewards/{name}/mean"] = estimate(values)
    return found


def score_estimates(config: Config, groups: Sequence[RolloutGroup]) -> dict[str, Estimate]:
    """pass@k, mean@n and maj@n of the function of eval.correct, for n completions a prompt.

    A completion without a value of that function does not count. pass@k is over the prompts with at
    least k completions that count. maj@n is missing if no completion marks an answer.
    """
    gate, n = config.eval_correct, config.eval.num_generations
    values = [[reward.by_name[gate.by] for reward in group.rewards] for group in groups]
    found: dict[str, Estimate] = {}
    for k in config.eval_ks:
        found[f"pass@{k}"] = estimate([pass_values(own, gate.threshold, k) for own in values])
    if n > 1:
        found[f"mean@{n}"] = estimate(values)
        votes = [
            majority_vote(_answers(group), [float(value >= gate.threshold) for value in own])
            for group, own in zip(groups, values, strict=True)
        ]
        if any(vote is not None for vote in votes):
            found[f"maj@{n}"] = estimate([[vote or 0.0] for vote in votes])
    return found


def pass_values(values: Sequence[float], threshold: float, k: int) -> list[float]:
    """pass@k of one prompt in a list; empty if fewer than k of its values are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < k:
        return []
    return [pass_at_k(len(known), sum(value >= threshold for value in known), k)]


def prompt_means(values: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each prompt's values; NaN where all of them are."""
    known = [[value for value in own if not math.isnan(value)] for own in values]
    return [statistics.fmean(own) if own else math.nan for own in known]


def _answers(group: RolloutGroup) -> list[str | None]:
    """What each completion marks as its answer, without spaces, dollars and a final full stop."""
    opened = OPEN_THINK if group.prompt.opens_think else ""
    marked = [marked_answer(opened + one.text, "any") for one in group.completions]
    votes = ["".join(one.split()).strip("$").rstrip(".") if one else None for one in marked]
    return [vote or None for vote in votes]
