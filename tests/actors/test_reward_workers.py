"""Reward workers for real: user code that raises, dies or hangs in a process of its own."""

import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from rlsys.actors.group import ActorFailure, PhaseTimeout
from rlsys.actors.reward import RewardWorkers
from rlsys.config import RewardConfig
from rlsys.rewards import orms
from rlsys.types import Completion, Prompt, RolloutGroup

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_cluster")]

PLUGIN = """
import os, sys, time
from pathlib import Path
from rlsys.rewards import ORM, register_reward

def helper(text):
    return float(text)

@register_reward("acts")
class Acts(ORM):
    def __init__(self):
        self.num_groups = 0

    def __call__(self, completions, act, **columns):
        self.num_groups += 1
        match act[0]:
            case "raise":
                return [helper(text) for text in completions]
            case "raise what cannot be pickled":
                raise type("Local", (Exception,), {})(lambda: 0)
            case "die":
                os._exit(3)
            case "exit":
                sys.exit(3)
            case "hang":
                Path("hanging").write_text(str(os.getpid()))
                while True:
                    pass
            case "sleep":
                time.sleep(1.2)
            case "environment":
                return [float(os.environ["RLSYS_TEST"]), float(os.getpid())]
        return [float(self.num_groups), float(len(completions[0]))]

@register_reward("unmade")
class Unmade(ORM):
    def __init__(self):
        open("no such model")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start workers with the plugin above; they and what it registers are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("acts.py").write_text(PLUGIN.replace('"hanging"', repr(str(tmp_path / "hanging"))))
    registered = dict(orms.data)
    started = []

    def start(*names: str, env_vars: dict[str, str] | None = None, **options) -> RewardWorkers:
        options = {"external_plugins": ["acts.py"], "timeout_s": 60.0} | options
        config = RewardConfig(reward_funcs=list(names), **options)
        started.append(RewardWorkers(config, env_vars=env_vars))
        return started[-1]

    yield start
    for workers in started:
        workers.close()
    orms.data.clear()
    orms.data.update(registered)


def group_of(group_id: int, act: str = "score") -> RolloutGroup:
    prompt = Prompt(f"train:{group_id}", [{"role": "user", "content": "a"}], [1], {"act": act})
    texts = ["x" * group_id, "<think></think><answer></answer>"]
    completions = [Completion([1], [0.0], text, "stop", (0,)) for text in texts]
    return RolloutGroup(group_id, prompt, completions)


def collect_all(workers: RewardWorkers) -> list[RolloutGroup]:
    scored = []
    while workers.num_pending:
        ray.wait(workers.pending_refs(), timeout=0.2)
        scored += workers.collect()
    return scored


def gone(pid: int) -> bool:
    for _ in range(600):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie":
            return True
        time.sleep(0.1)
    return False


def test_groups_come_back_scored_whatever_worker_had_them(start):
    workers = start("format", "acts", num_workers=2, reward_weights=[2.0, 1.0])
    assert workers.collect() == []
    groups = [group_of(i) for i in range(7)]
    for group in groups:
        workers.submit(group)
    assert workers.num_pending == 7
    assert len(workers.pending_refs()) == 2  # one group at a time a worker
    scored = collect_all(workers)
    assert sorted(group.group_id for group in scored) == list(range(7))
    for group in scored:
        assert replace(group, rewards=[]) == groups[group.group_id]
        first, second = group.rewards
        assert list(first.by_name) == ["format", "acts"]
        assert (first.by_name["format"], second.by_name["format"]) == (0.0, 1.0)
        assert second.total == 2.0 + group.group_id
    # An instance a worker, kept between groups: 7 groups were counted in two processes.
    counts = [group.rewards[0].by_name["acts"] for group in scored]
    assert 4 <= max(counts) <= 7
    assert workers.num_pending == 0
    assert workers.pending_refs() == []


def test_an_exception_ends_with_the_users_own_traceback(start):
    workers = start("format", "acts")
    workers.submit(group_of(4, "raise"))
    with pytest.raises(ActorFailure) as caught:
        collect_all(workers)
    *frames, error, empty, summary = str(caught.value).splitlines()
    assert error == "ValueError: could not convert string to float: 'xxxx'"
    assert empty == ""
    assert summary.startswith("reward function 'acts' raised ValueError on prompt 'train:4'")
    assert any("return float(text)" in line for line in frames)
    assert not any("rlsys/" in line or "ray/" in line for line in frames)


def test_an_exception_that_cannot_be_pickled_is_told_too(start):
    workers = start("acts")
    workers.submit(group_of(4, "raise what cannot be pickled"))
    with pytest.raises(ActorFailure, match="'acts' raised Local on prompt 'train:4'"):
        collect_all(workers)


def test_a_worker_that_dies_is_an_error_and_not_a_hang(start):
    workers = start("format", "acts", num_workers=2)
    for group_id in range(4):
        workers.submit(group_of(group_id, "die" if group_id == 1 else "score"))
    with pytest.raises(ActorFailure) as caught:
        collect_all(workers)
    last = str(caught.value).splitlines()[-1]
    assert last == "reward worker 1 died in scoring prompt 'train:1' with format, acts"


def test_a_worker_that_hangs_is_killed(start, tmp_path):
    workers = start("format", "acts", num_workers=2, timeout_s=2.0)
    for group_id in range(4):
        workers.submit(group_of(group_id, "hang" if group_id == 0 else "score"))
    with pytest.raises(PhaseTimeout) as caught:
        collect_all(workers)
    assert str(caught.value).startswith(
        "reward worker 0 was killed: scoring prompt 'train:0' with format, acts took longer than "
        "reward.timeout_s = 2 s."
    )
    assert gone(int((tmp_path / "hanging").read_text()))


def test_the_limit_is_for_one_group_and_not_for_its_wait_in_the_queue(start):
    workers = start("acts", timeout_s=3.0)
    for group_id in range(3):
        workers.submit(group_of(group_id, "sleep"))  # 3.6 s in all
    assert len(collect_all(workers)) == 3


def test_a_group_that_was_done_in_time_may_be_collected_late(start):
    workers = start("acts", timeout_s=1.0)
    workers.submit(group_of(2))
    ray.wait(workers.pending_refs(), timeout=60)
    time.sleep(1.5)
    assert [group.group_id for group in workers.collect()] == [2]


def test_workers_get_the_environment_asked_for_and_end_with_close(start):
    workers = start("acts", env_vars={"RLSYS_TEST": "17"})
    workers.submit(group_of(0, "environment"))
    [group] = collect_all(workers)
    value, pid = (reward.total for reward in group.rewards)
    assert value == 17.0
    assert int(pid) != os.getpid()
    assert psutil.pid_exists(int(pid))
    workers.submit(group_of(1, "hang"))
    workers.close()
    assert gone(int(pid))
    assert workers.num_pending == 0
    workers.close()


def test_what_cannot_work_is_an_error_before_any_process_starts(start):
    with pytest.raises(ValueError, match=r"unknown reward function 'act'. Did you mean 'acts'"):
        start("act")
    with pytest.raises(ValueError, match=r"1 values for 2 reward functions"):
        start("acts", "format", reward_weights=[1.0])
    with pytest.raises(ValueError, match=r"no_such\.py' is not a file"):
        start("format", external_plugins=["no_such.py"])
    Path("broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"(?s)broken\.py.*nothing_of_this_name"):
        start("format", external_plugins=["broken.py"])


def test_a_class_that_cannot_be_made_shows_its_traceback(start):
    with pytest.raises(ActorFailure) as caught:
        start("unmade")
    assert 'open("no such model")' in str(caught.value)
    assert "reward function 'unmade': Unmade() raised FileNotFoundError" in str(caught.value)
