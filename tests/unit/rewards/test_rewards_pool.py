"""Reward code that raises, dies, hangs or leaks, in processes of its own: without Ray."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from reward_programs import PROGRAM_COMPLETIONS, PROGRAM_VALUES, PROGRAMS, SIBLING
from waiting import eventually

from rlsys.config import RewardConfig
from rlsys.processes import descendants
from rlsys.rewards import check_functions, load_plugins
from rlsys.rewards.pool.failures import RewardCodeError
from rlsys.rewards.pool.guard import memory_of
from rlsys.rewards.pool.process import LocalBackend
from rlsys.rewards.pool.scorer import GroupScorer, local_scorer
from rlsys.rewards.pool.serve import process_settings
from rlsys.types import Completion, Prompt, RolloutGroup

pytestmark = pytest.mark.processes

PLUGIN = """
import asyncio, ctypes, multiprocessing, os, statistics, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
from rlsys.rewards import ORM, AsyncORM, register_reward

def act(text):
    match text:
        case "raise": return float(text)
        case "die": os._exit(3)
        case "exit": sys.exit(3)
        case "segfault": ctypes.string_at(0)
        case "hang":
            while True: pass
        case "hang in C": ctypes.PyDLL(None).pause()  # holds the interpreter for ever
        case "leak":
            hoard = []
            while True: hoard.append(b"x" * (50 << 20))
        case "child leaks":
            code = "hoard = [b'x' * (50 << 20) for _ in range(8)]; import time; time.sleep(60)"
            subprocess.run([sys.executable, "-c", code])
        case "none": return None
    return float(len(text))

@register_reward("acts")
class Acts(ORM):
    def __call__(self, completions, **columns):
        return [act(text) for text in completions]

@register_reward("length")
def length(completions, **columns):
    return [float(len(text)) for text in completions]

@register_reward("ids")
def ids(completions, **columns):
    return [float(os.getpid())] * len(completions)

@register_reward("steps")
def steps(completions, trainer_state, **columns):
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

@register_reward("spread")
def spread(completions, **columns):  # needs siblings, and fails without them for another reason
    if "raise" in completions:
        raise KeyError("raise")
    return [statistics.stdev(map(len, completions))] * len(completions)

@register_reward("calls")
class Calls(ORM):
    def __init__(self):
        self.seen = []

    def __call__(self, completions, **columns):
        self.seen += completions
        return [float(len(self.seen))] * len(completions)

warm = []

@register_reward("lazy")
def lazy(completions, **columns):
    if not warm:
        time.sleep(1.5)  # an import, a connection
        warm.append(1)
    while "hang" in completions:
        pass
    return [1.0] * len(completions)

@register_reward("starts")
def starts(completions, **columns):  # a program that outlives what waits for it
    for text in completions:
        with open(text.partition(" ")[2], "w") as file:
            program = "import os, time; print(os.getpid(), flush=True); time.sleep(3600)"
            child = subprocess.Popen([sys.executable, "-c", program], stdout=file)
        if text.startswith("die"):
            while not os.path.getsize(file.name):
                pass
            os._exit(3)
        child.wait()

together = 0

@register_reward("locks")
def locks(completions, **columns):
    shared = SharedMemory(create=True, size=4096)
    lock = multiprocessing.get_context("spawn").Lock()
    names = ["/dev/shm/" + shared.name, "/dev/shm/sem." + lock._semlock.name[1:]]
    for text in completions:
        with open(text.partition(" ")[2], "w") as file:
            print(*names, sep="\\n", file=file)
    time.sleep(3600)

@register_reward("waits")
class Waits(AsyncORM):
    async def __call__(self, completions, **columns):
        return await asyncio.gather(*map(self.one, completions))

    async def one(self, text):
        global together
        together += 1
        await asyncio.sleep(3600 if text == "hang" else 0.2)
        if text == "block":
            time.sleep(3600)
        if text == "die":
            os._exit(3)
        return float(together)

@register_reward("unmade")
class Unmade(ORM):
    def __init__(self):
        open("no such model")
"""


@pytest.fixture
def start(tmp_path, forget_registrations):
    """Start a scorer with the plugin above; it and what it registers are gone afterwards."""
    plugin = tmp_path / "acts.py"
    plugin.write_text(PLUGIN)
    load_plugins([plugin])
    scorers = []

    def start(*names: str, **options) -> GroupScorer:
        options = {"external_plugins": [str(plugin)]} | options
        config = RewardConfig(reward_funcs=list(names), **options)
        check_functions(config)
        scorers.append(local_scorer(config, max_steps=10))
        return scorers[-1]

    yield start
    for scorer in scorers:
        scorer.close()


def group_of(*texts: str, ticket: int = 0) -> RolloutGroup:
    prompt = Prompt(f"train:{ticket}", [{"role": "user", "content": "a"}], [1], {})
    completions = [Completion([1], [0.0], text, "stop", (4, 5)) for text in texts]
    return RolloutGroup(ticket, prompt, completions)


def score(scorer: GroupScorer, *groups: RolloutGroup) -> list[RolloutGroup]:
    for group in groups:
        scorer.submit(group)
    scored = []
    while scorer.num_pending:
        scorer.wait(0.2)
        scored += scorer.collect()
    return sorted(scored, key=lambda group: group.ticket)


def gone(pid: int) -> bool:
    return eventually(
        lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie",
        f"process {pid} ends",
    )


def totals(group: RolloutGroup) -> list[float]:
    return [reward.total for reward in group.rewards]


def test_groups_come_back_scored_and_otherwise_as_they_were(start):
    scorer = start("length", "format", "steps", num_workers=2, reward_weights=[1.0, 10.0, 100.0])
    groups = [group_of("x" * i, "<think></think><answer></answer>", ticket=i) for i in range(6)]
    scored = score(scorer, *groups)
    for before, after in zip(groups, scored, strict=True):
        assert after.completions == before.completions
        assert after.prompt == before.prompt
        first, second = after.rewards
        assert list(first.by_name) == ["length", "format", "steps"]
        assert first.by_name == {"length": after.ticket, "format": 0.0, "steps": 0.5}
        assert second.total == 32 + 10 + 50
        assert first.failures == {}
    assert scorer.num_pending == 0
    assert scorer.pending_refs() == []


def test_bad_completions_cost_their_siblings_nothing(start, caplog, monkeypatch):
    monkeypatch.setattr("rlsys.rewards.pool.scorer.MIN_ALONE_S", 2.0)
    scorer = start("acts", "length", timeout_s=4.0, num_workers=2)
    texts = ["a", "die", "segfault", "hang", "hang in C", "ccc"]
    [bad, good] = score(scorer, group_of(*texts), group_of("dddd", "ee", ticket=1))
    assert totals(good) == [8.0, 4.0]
    assert totals(bad) == [2.0, *map(len, texts[1:-1]), 6.0]
    crashed, timeout = {"acts": "crashed"}, {"acts": "timeout"}
    failures = [reward.failures for reward in bad.rewards]
    assert failures == [{}, crashed, crashed, timeout, timeout, {}]
    assert bad.rewards[1].by_name == {"acts": 0.0, "length": 3.0}
    # The first of each kind is told with the completion.
    told = sorted(record.getMessage() for record in caplog.records)
    note = "note: a process of 'acts', 'length' failed in scoring and is replaced: reward process"
    assert [text.startswith(note) for text in told] == [False, True, False]
    told = [text for text in told if not text.startswith(note)]
    assert all(re.search(r"\(prompt 'train:0', completion [1-4]: '", text) for text in told)
    [killed] = [text for text in told if "was killed after" in text]
    assert re.match(r"It was here, the innermost call first:\n  File .* in act\n  File", killed)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "programs.py").write_text(PROGRAMS)
    (tmp_path / "helper_beside.py").write_text(SIBLING)
    load_plugins([tmp_path / "programs.py"])
    return {"external_plugins": [str(tmp_path / "programs.py")]}


def test_a_function_may_do_what_a_script_may(start, programs):
    scorer = start(*PROGRAM_VALUES, **programs, timeout_s=60.0)
    [group] = score(scorer, group_of(*PROGRAM_COMPLETIONS))
    values = [reward.by_name for reward in group.rewards]
    assert {name: [row[name] for row in values] for name in PROGRAM_VALUES} == PROGRAM_VALUES


def test_the_pool_of_a_function_ends_with_its_process(start, programs, tmp_path):
    scorer = start("hangs", **programs, timeout_s=2.0)
    paths = [str(tmp_path / name) for name in "ab"]
    [group] = score(scorer, group_of(*paths))
    assert [reward.failures for reward in group.rewards] == [{"hangs": "timeout"}] * 2
    assert all(gone(int(Path(path).read_text())) for path in paths)


@pytest.mark.parametrize("leak", ["leak", "child leaks"])
def test_a_process_that_holds_too_much_memory_is_killed_long_before_its_time(start, leak):
    scorer = start("acts", timeout_s=300.0, max_memory_mb=300)
    [group] = score(scorer, group_of("a", leak))
    assert [reward.failures for reward in group.rewards] == [{}, {"acts": "crashed"}]
    assert totals(group) == [1.0, 0.0]


def test_memory_that_a_process_shares_with_its_children_counts_once():
    code = """
import os, time
hoard = bytearray(os.urandom(1)) * (150 << 20)
if os.fork() and os.fork():
    print("ready", flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert parent.stdout.readline() == b"ready\n"
        pids = descendants(parent.pid)
        assert len(pids) == 3
        assert memory_of(pids, limit=1 << 40) > 400 << 20
        assert 150 << 20 < memory_of(pids, limit=1) < 250 << 20
        assert memory_of([*pids, 2**22 - 1], limit=1) < 250 << 20  # one that has ended
    finally:
        for pid in descendants(parent.pid)[::-1]:
            os.kill(pid, signal.SIGKILL)
        parent.communicate()
    assert descendants(parent.pid) == [parent.pid]
    assert memory_of([parent.pid], limit=1) == 0


def test_a_plugin_that_the_workers_host_lacks_is_named_with_the_host(start, tmp_path):
    config = RewardConfig(reward_funcs=["format"], external_plugins=["only_here.py"])
    settings = replace(process_settings(config, {}), directory=str(tmp_path / "not there"))
    with pytest.raises(RewardCodeError) as raised:
        GroupScorer(config, LocalBackend(settings)).start()
    message = str(raised.value)
    assert f"on host {socket.gethostname()} has no only_here.py" in message
    assert f"it has no {tmp_path / 'not there'}, that of the run" in message
    assert "--working-dir" in message


def test_a_process_that_is_killed_is_gone_and_another_one_goes_on(start):
    scorer = start("ids", "acts", timeout_s=1.0)
    [first] = score(scorer, group_of("a"))
    [hung] = score(scorer, group_of("hang"))
    [last] = score(scorer, group_of("a"))
    before, after = (int(g.rewards[0].by_name["ids"]) for g in (first, last))
    assert before != after
    assert not psutil.pid_exists(before)
    assert hung.rewards[0].failures == {"acts": "timeout"}
    scorer.close()
    assert not psutil.pid_exists(after)
    assert scorer.num_pending == 0


def test_dropped_completions_have_no_total(start):
    scorer = start("acts", "length", on_error="drop")
    [group] = score(scorer, group_of("a", "raise", "die", "none"))
    assert totals(group)[0] == 2.0
    assert totals(group)[3] == 4.0  # None is no failure
    for index, failure in ((1, "error"), (2, "crashed")):
        assert math.isnan(totals(group)[index])
        assert math.isnan(group.rewards[index].by_name["acts"])
        assert group.rewards[index].failures == {"acts": failure}


def test_timeouts_may_have_a_policy_of_their_own(start):
    scorer = start("acts", on_error="zero", on_timeout="drop")
    [group] = score(scorer, group_of("raise", "die"))
    assert totals(group)[0] == 0.0
    assert math.isnan(totals(group)[1])
    scorer = start("acts", on_timeout="raise")
    with pytest.raises(RewardCodeError, match=r"(?s)'acts' ended its process.*completion 1: 'die'"):
        score(scorer, group_of("a", "die"))


@pytest.mark.parametrize(("act", "error"), [("raise", "ValueError"), ("exit", "SystemExit")])
def test_an_exception_ends_with_the_users_own_traceback_and_the_completion(start, act, error):
    scorer = start("length", "acts")
    with pytest.raises(RewardCodeError) as caught:
        score(scorer, group_of("a", "b", act))
    first, *frames, raised, empty, summary, where = str(caught.value).splitlines()
    assert first == "Traceback (most recent call last):"
    assert raised.startswith(error)
    assert empty == ""
    assert summary.startswith(f"reward function 'acts' raised {error} on prompt 'train:0'")
    assert where == f"(prompt 'train:0', completion 2: {act!r})"
    assert "return [act(text) for text in completions]" in "".join(frames)
    assert not any("rlsys/" in line for line in frames)


def test_an_exception_of_siblings_together_is_not_hidden_by_trying_them_alone(start):
    scorer = start("spread")
    with pytest.raises(RewardCodeError, match="KeyError: 'raise'"):
        score(scorer, group_of("a", "raise", "c"))
    scorer = start("spread", on_error="zero")
    [group] = score(scorer, group_of("a", "raise", "c"))
    assert [reward.failures for reward in group.rewards] == [{"spread": "error"}] * 3


def test_a_gate_keeps_a_function_from_being_called(start):
    gate = {"calls": "length >= 3"}
    scorer = start("length", "calls", gate=gate, reward_weights=[0.0, 1.0])
    [group] = score(scorer, group_of("a", "abc", "ab", "abcd"))
    assert totals(group) == [0.0, 2.0, 0.0, 2.0]
    [group] = score(scorer, group_of("a", "b"))
    assert [r.by_name for r in group.rewards] == [{"length": 1.0, "calls": 0.0}] * 2


def test_a_gate_that_says_none_does_not_apply(start):
    scorer = start("acts", "length", gate={"length": "acts >= 5"})
    [group] = score(scorer, group_of("none", "a"))
    assert totals(group) == [4.0, 1.0]


def test_async_functions_of_many_groups_run_together(start):
    scorer = start("waits", "length")
    groups = [group_of(*"ab", ticket=i) for i in range(20)]
    scored = score(scorer, *groups)
    together = [reward.by_name["waits"] for group in scored for reward in group.rewards]
    assert max(together) == 40  # all had begun before the first one ended
    assert min(together) > 2
    assert totals(scored[0]) == [value + 1 for value in together[:2]]


def test_bad_async_calls_cost_the_others_nothing(start, monkeypatch):
    monkeypatch.setattr("rlsys.rewards.pool.workers.ASYNC_GRACE_S", 0.5)
    scorer = start("waits", timeout_s=1.0)
    bad = group_of("a", "hang", "die", "block")
    scored = score(scorer, bad, *(group_of("b", ticket=i) for i in (1, 2)))
    failures = [reward.failures.get("waits") for reward in scored[0].rewards]
    assert failures == [None, "timeout", "crashed", "timeout"]
    assert all(reward.failures == {} for group in scored[1:] for reward in group.rewards)
    assert all(value > 0 for group in scored[1:] for value in totals(group))


def test_a_class_that_cannot_be_made_shows_its_traceback(start):
    with pytest.raises(RewardCodeError) as caught:
        start("unmade")
    assert 'open("no such model")' in str(caught.value)
    assert "reward function 'unmade': Unmade() raised FileNotFoundError" in str(caught.value)


def test_the_guard_of_memory_ends_with_its_process(start):
    scorer = start("ids")
    [group] = score(scorer, group_of("a"))
    worker = psutil.Process(int(totals(group)[0]))
    assert worker.ppid() == os.getpid()
    [guard] = worker.children()
    scorer.close()
    eventually(lambda: not guard.is_running(), "the guard ends")


def test_the_first_call_in_a_new_process_has_all_the_time(start):
    scorer = start("lazy", timeout_s=4.0)
    [group] = score(scorer, group_of("a", "hang", *"bcdef"))
    failures = [reward.failures for reward in group.rewards]
    assert failures == [{}, {"lazy": "timeout"}, *[{}] * 5]
    assert totals(group) == [1.0, 0.0, *[1.0] * 5]


@pytest.mark.parametrize("end", ["die", "hang"])
def test_processes_that_a_function_started_end_with_its_process(start, tmp_path, end):
    scorer = start("starts", timeout_s=3.0)
    path = tmp_path / "pid"
    [group] = score(scorer, group_of(f"{end} {path}"))
    assert list(group.rewards[0].failures) == ["starts"]
    pid = int(path.read_text())
    assert gone(pid)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux only")
def test_a_process_that_is_killed_leaves_no_semaphore_or_shared_memory(start, tmp_path):
    """Python's resource tracker, which would remove them, is killed with it."""
    scorer = start("locks", timeout_s=3.0)
    path = tmp_path / "names"
    [group] = score(scorer, group_of(f"hang {path}"))
    assert group.rewards[0].failures == {"locks": "timeout"}
    names = path.read_text().split()
    assert len(names) == 2
    eventually(lambda: not any(map(os.path.exists, names)), f"{names} are removed")


def test_nothing_is_left_when_a_start_fails(start, tmp_path):
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(RewardCodeError):
        start("length", "unmade", num_workers=2)
    assert {child.pid for child in psutil.Process().children()} <= before
    assert Path(tmp_path / "acts.py").exists()
