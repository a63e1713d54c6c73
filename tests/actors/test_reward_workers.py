"""Reward workers as Ray actors; tests/unit/rewards/test_rewards_pool.py is about failures."""

import math
import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from reward_programs import PROGRAM_COMPLETIONS, PROGRAM_VALUES, PROGRAMS, SIBLING
from waiting import eventually

from rlsys.actors.reward import RewardWorkers
from rlsys.config import RewardConfig
from rlsys.rewards.pool.failures import RewardCodeError
from rlsys.types import Completion, Prompt, RolloutGroup

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("ray_cluster")]

PLUGIN = """
import asyncio, ctypes, os
from rlsys.rewards import ORM, register_reward

@register_reward("acts")
class Acts(ORM):
    def __init__(self, max_completion_length: int):
        self.limit = max_completion_length

    def __call__(self, completions, **columns):
        return [self.act(text) for text in completions]

    def act(self, text):
        match text:
            case "raise": raise type("Local", (Exception,), {})(lambda: 0)  # cannot be pickled
            case "die": os._exit(3)
            case "segfault": ctypes.string_at(0)
            case "hang in C": ctypes.PyDLL(None).pause()  # holds the interpreter for ever
            case "leak":
                hoard = []
                while True: hoard.append(b"x" * (50 << 20))
            case "pid": return float(os.getpid())
        return float(self.limit)

@register_reward("waits")
async def waits(completions, **columns):
    await asyncio.sleep(3600 if "hang" in completions else 0.1)
    return [0.5] * len(completions)
"""


@pytest.fixture
def start(tmp_path, monkeypatch, forget_registrations):
    """Start workers with the plugin above; they and what it registers are gone afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("acts.py").write_text(PLUGIN)
    started = []

    def start(*names: str, **options) -> RewardWorkers:
        options = {"external_plugins": ["acts.py"], "timeout_s": 60.0} | options
        config = RewardConfig(reward_funcs=list(names), **options)
        run_values = {"max_completion_length": 7}
        started.append(RewardWorkers(config, run_values=run_values))
        started[-1].start()
        return started[-1]

    yield start
    for workers in started:
        workers.close()


def group_of(*texts: str, ticket: int = 0) -> RolloutGroup:
    prompt = Prompt(f"train:{ticket}", [{"role": "user", "content": "a"}], [1], {})
    completions = [Completion([1], [0.0], text, "stop", (0,)) for text in texts]
    return RolloutGroup(ticket, prompt, completions)


def score(workers: RewardWorkers, *groups: RolloutGroup) -> list[RolloutGroup]:
    for group in groups:
        workers.submit(group)
    scored = []
    while workers.num_pending:
        ray.wait(workers.pending_refs(), timeout=0.2)
        scored += workers.collect()
    return sorted(scored, key=lambda group: group.ticket)


def gone(pid: int) -> bool:
    return eventually(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie",
        f"process {pid} ends",
    )


def test_groups_are_scored_by_functions_of_both_kinds(start):
    workers = start("format", "acts", "waits", num_workers=2, reward_weights=[2.0, 1.0, 1.0])
    assert workers.collect() == []
    groups = [group_of("x", "<think></think><answer></answer>", ticket=i) for i in range(7)]
    for before, after in zip(groups, score(workers, *groups), strict=True):
        assert replace(after, rewards=[]) == before
        first, second = after.rewards
        assert first.by_name == {"format": 0.0, "acts": 7.0, "waits": 0.5}
        assert (first.total, second.total) == (7.5, 9.5)


def test_bad_completions_are_found_and_their_siblings_keep_their_rewards(start):
    workers = start("acts", num_workers=2, timeout_s=6.0, max_memory_mb=700, on_error="drop")
    texts = ("a", "die", "segfault", "hang in C", "leak", "raise", "b")
    [bad, good] = score(workers, group_of(*texts), group_of("a", "b", ticket=1))
    assert [reward.total for reward in good.rewards] == [7.0, 7.0]
    assert [bad.rewards[0].total, bad.rewards[-1].total] == [7.0, 7.0]
    failures = [reward.failures.get("acts") for reward in bad.rewards]
    assert failures == [None, "crashed", "crashed", "timeout", "crashed", "error", None]
    assert all(math.isnan(reward.total) for reward in bad.rewards[1:-1])


def test_a_function_may_do_what_a_script_may(start, tmp_path):
    Path("programs.py").write_text(PROGRAMS)
    Path("helper_beside.py").write_text(SIBLING)
    workers = start(*PROGRAM_VALUES, external_plugins=["programs.py"])
    [group] = score(workers, group_of(*PROGRAM_COMPLETIONS))
    values = [reward.by_name for reward in group.rewards]
    assert {name: [row[name] for row in values] for name in PROGRAM_VALUES} == PROGRAM_VALUES
    workers.close()
    workers = start("hangs", external_plugins=["programs.py"])
    path = tmp_path / "pid"
    workers.submit(group_of(str(path)))
    eventually(lambda: path.exists() and path.read_text(), "the function starts")
    workers.close()
    assert gone(int(path.read_text()))


def test_an_async_call_that_hangs_is_cancelled(start):
    workers = start("waits", timeout_s=2.0)
    [bad, good] = score(workers, group_of("hang", "a"), group_of("b", ticket=1))
    assert [reward.failures for reward in bad.rewards] == [{"waits": "timeout"}, {}]
    assert [reward.total for reward in bad.rewards + good.rewards] == [0.0, 0.5, 0.5]


def test_an_exception_ends_with_the_users_own_traceback(start):
    workers = start("format", "acts")
    with pytest.raises(RewardCodeError) as caught:
        score(workers, group_of("a", "raise"))
    assert "reward function 'acts' raised Local on prompt 'train:0'" in str(caught.value)
    assert "rlsys/" not in str(caught.value)
    assert "ray/" not in str(caught.value)


def test_workers_are_processes_that_end_with_close(start):
    workers = start("acts")
    [group] = score(workers, group_of("pid"))
    pid = group.rewards[0].total
    assert int(pid) != os.getpid()
    workers.submit(group_of("hang in C"))
    workers.close()
    assert gone(int(pid))
    assert workers.num_pending == 0
    workers.close()


def test_mistakes_are_errors_before_any_process_starts(start):
    with pytest.raises(ValueError, match=r"unknown reward function 'act'. Did you mean 'acts'"):
        start("act")
    with pytest.raises(ValueError, match=r"1 value for 2 reward functions"):
        start("acts", "format", reward_weights=[1.0])
    with pytest.raises(ValueError, match=r"no_such\.py' is not a file"):
        start("format", external_plugins=["no_such.py"])
    Path("broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"(?s)broken\.py.*nothing_of_this_name"):
        start("format", external_plugins=["broken.py"])
