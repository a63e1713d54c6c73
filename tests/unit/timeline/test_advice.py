"""Advice: each rule speaks where docs/performance.md says so, and only there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import rlsys
from rlsys.timeline.advice import RunFacts, advise
from rlsys.timeline.shares import ActorTime, TimeShares
from rlsys.timeline.table import summary_text

DOCS = Path(rlsys.__file__).parent.parent / "docs"


def shares(*, policy: float = 0.5, rollout: float = 0.5, **limits: float) -> TimeShares:
    """100 s in which the run waited for `limits`, in percent; `policy` and `rollout` are idle."""
    found = TimeShares(seconds=100.0, steps=[1, 2])
    found.limits.update(limits)
    found.phases.update(limits)
    for role, name, idle in (("policy", "update", policy), ("rollout", "sample", rollout)):
        found.actors[f"{role} 0"] = ActorTime(role, {name: 100 * (1 - idle)})
    found.actors["reward worker 0"] = ActorTime("reward", {"format": 1.0, "judge": 20.0})
    return found


CASES = [
    (shares(sampling=45, evaluation=40, policy_update=15), RunFacts(), "eval_steps"),
    (shares(sampling=45, checkpoint=20, policy_update=35), RunFacts(), "checkpoint.save_steps"),
    (shares(sampling=30, reward=40, policy_update=30), RunFacts(), "reward.num_workers"),
    (shares(sampling=30, reward=40, policy_update=30), RunFacts(), "judge"),
    (shares(sampling=40, weight_sync=30, policy_update=30), RunFacts(), "transport_seconds"),
    (
        shares(sampling=40, weight_sync=30, policy_update=30),
        RunFacts(is_colocated=True),
        "placement: dedicated",
    ),
    (shares(sampling=40, other=30, policy_update=30), RunFacts(), "tracking.report_to"),
    (shares(data=40, policy_update=60), RunFacts(method="sft"), "data.streaming"),
    # Policy and engines idle in turns.
    (shares(sampling=55, policy_update=45), RunFacts(), "rollout.max_staleness: 1"),
    # It runs ahead already, and waits for the longest completion.
    (
        shares(sampling=40, policy_update=60, rollout=0.05),
        RunFacts(max_staleness=1, longest_over_mean=8.0),
        "rollout.max_staleness: 2",
    ),
    (
        shares(sampling=40, policy_update=60, rollout=0.05),
        RunFacts(max_staleness=4, longest_over_mean=8.0),
        "rollout.max_completion_length",
    ),
    (
        shares(sampling=80, policy_update=20),
        RunFacts(is_colocated=True, longest_over_mean=8.0),
        "rollout.max_completion_length",
    ),
    # Sampling limits although it runs ahead, or the update does.
    (
        shares(sampling=70, policy_update=30, rollout=0.0),
        RunFacts(max_staleness=2),
        "rollout.num_engines",
    ),
    (shares(sampling=70, policy_update=30), RunFacts(is_colocated=True), "more GPUs"),
    (
        shares(sampling=5, policy_update=95, policy=0.05, rollout=0.6),
        RunFacts(max_staleness=2),
        "engines idle 60%: raise policy.world_size",
    ),
    (shares(sampling=20, ref_logprobs=70, policy_update=10), RunFacts(max_staleness=1), "world_"),
    (shares(policy_update=99), RunFacts(method="sft"), "policy.world_size"),
    (shares(sampling=70, policy_update=30), RunFacts(device="cpu"), "more cores"),
    (shares(sampling=30, policy_update=70), RunFacts(device="cpu"), "fewer tokens"),
]


@pytest.mark.parametrize(("where", "run", "expected"), CASES)
def test_the_advice_names_what_to_change(where, run, expected):
    assert expected in advise(where, run)


def test_staleness_is_not_advised_where_it_is_on_or_where_nothing_could_overlap():
    for run in (RunFacts(max_staleness=1), RunFacts(is_colocated=True), RunFacts(device="cpu")):
        assert "max_staleness" not in advise(shares(sampling=55, policy_update=45), run)


def test_every_setting_that_advice_names_is_a_field_of_the_config():
    fields = (DOCS / "config.md").read_text()
    for where, run, _ in CASES:
        for name in re.findall(
            r"\b(?:\w+\.\w+|eval_steps|generation_batch_size)\b", advise(where, run)
        ):
            assert name.rpartition(".")[2] in fields, name


def test_the_page_has_a_row_for_every_rule():
    page = (DOCS / "performance.md").read_text().partition("## Where the time goes")[2]
    page = page.partition("\n## ")[0]
    named = {
        *("eval_steps", "checkpoint.save_steps", "reward.num_workers", "data.streaming"),
        *("tracking.report_to", "rollout.max_staleness", "rollout.num_engines"),
        *("rollout.max_completion_length", "policy.world_size", "weight_sync/transport_seconds"),
    }
    assert {name for name in named if name not in page} == set()


def test_the_table_says_phases_actors_speed_limit_and_advice():
    where = shares(sampling=55, policy_update=45)
    text = summary_text(where, RunFacts(), {"completion tokens": 1234.5})
    assert text.splitlines()[0] == "Where the time went, steps 1 to 2: 100.0 s, 50.00 s a step"
    assert "| policy_update |    45.0 | 22.500 | 45.0% |" in text
    assert "| policy 0        |  50% |  50% |" in text
    assert "completion tokens a second: 1,234\n" in text
    assert "limited by: sampling, 55.0%\n" in text
    assert text.endswith("in turns: set rollout.max_staleness: 1\n")


def test_many_actors_are_one_row_a_role():
    where = shares(sampling=55, policy_update=45)
    for number in range(40):
        where.actors[f"rollout {number}"] = ActorTime("rollout", {"sample": 50.0})
    text = summary_text(where, RunFacts(), {})
    assert "rollout 7" not in text
    assert "| rollout |  50% |  50% |" in text
