"""Measures the throughput of reward workers. Prints JSON.

    python benchmarks/rewards.py
    python benchmarks/rewards.py --backend local     # without Ray, as `rlsys rewards try`

- `cpu`: 1,024 completions of 8 a group through a function that needs 10 ms of a core for each, on
  two workers. Ideal is 5.12 s, if the machine has two cores to spare; `bare_seconds` is what two
  processes take that do nothing else, measured before and after.
- `sleep`: the same with a function that sleeps 10 ms, which does not depend on free cores.
- `async`: 256 calls of 100 ms, of 32 groups. Ideal is 0.1 s.
- `bad_group`: seconds until a group with one completion that hangs, and two workers with a limit of
  4 s, is scored; and of 63 good groups that are submitted behind it.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from machine import describe_machine

from rlsys.config import RewardConfig
from rlsys.rewards import load_plugins
from rlsys.rewards.pool.scorer import local_scorer
from rlsys.types import Completion, Prompt, RolloutGroup

PLUGIN = """
import asyncio, time
from rlsys.rewards import register_reward

@register_reward("bench_cpu")
def cpu(completions, **columns):
    for _ in completions:
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass
    return [1.0] * len(completions)

@register_reward("bench_sleep")
def sleep(completions, **columns):
    for _ in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)

@register_reward("bench_async")
async def waits(completions, **columns):
    await asyncio.gather(*(asyncio.sleep(0.1) for _ in completions))
    return [1.0] * len(completions)

@register_reward("bench_hang")
def hang(completions, **columns):
    while "hang" in completions:
        pass
    return [1.0] * len(completions)
"""
GROUP_SIZE = 8
COMPLETION_TOKENS = 500


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["ray", "local"], default="ray")
    arguments = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as folder, cluster(arguments.backend):
        plugin = Path(folder) / "plugin.py"
        plugin.write_text(PLUGIN)
        load_plugins([plugin])
        start = starter(arguments.backend, plugin)
        results = {
            "cpu": cpu_bound(start("bench_cpu")),
            "sleep": many(start("bench_sleep"), 1024, ideal_s=1024 * 0.01 / 2),
            "async": many(start("bench_async"), 256, ideal_s=0.1),
            "bad_group": bad_group(start("bench_hang")),
        }
    print(json.dumps({"machine": machine, "backend": arguments.backend, **results}, indent=2))


def cluster(backend):
    if backend != "ray":
        return nullcontext()
    from rlsys.actors.ray_session import ray_session

    return ray_session(log_to_driver=False)


def starter(backend, plugin):
    def start(name):
        config = RewardConfig(
            reward_funcs=[name], external_plugins=[str(plugin)], num_workers=2, timeout_s=4.0
        )
        if backend == "ray":
            from rlsys.actors.reward import RewardWorkers

            workers = RewardWorkers(config)
            workers.start()
            return workers
        return local_scorer(config)

    return start


def groups_of(count):
    prompt = Prompt("p", [{"role": "user", "content": "a"}], list(range(100)), {"nums": [1, 2]})
    ids = list(range(COMPLETION_TOKENS))
    completion = Completion(ids, [-1.0] * COMPLETION_TOKENS, "x" * 2000, "stop", (0,))
    return [RolloutGroup(i, prompt, [completion] * GROUP_SIZE) for i in range(count // GROUP_SIZE)]


def score(pool, groups):
    """Seconds from the first submission until each group was scored."""
    begin, driver = time.perf_counter(), time.process_time()
    for group in groups:
        pool.submit(group)
    seconds = {}
    while pool.num_pending:
        pool.wait(0.5)
        for group in pool.collect():
            seconds[group.ticket] = time.perf_counter() - begin
    return seconds, time.process_time() - driver


def many(pool, count, ideal_s):
    score(pool, groups_of(2 * GROUP_SIZE))  # both workers have run once
    seconds, driver_cpu = score(pool, groups_of(count))
    pool.close()
    total = max(seconds.values())
    return {
        "completions": count,
        "seconds": round(total, 3),
        "ideal_seconds": ideal_s,
        "ratio_to_ideal": round(total / ideal_s, 3),
        "driver_cpu_seconds": round(driver_cpu, 3),
    }


def cpu_bound(pool):
    before = bare_seconds(512)
    result = many(pool, 1024, ideal_s=1024 * 0.01 / 2)
    bare = (before + bare_seconds(512)) / 2
    return result | {
        "bare_seconds": round(bare, 3),
        "ratio_to_bare": round(result["seconds"] / bare, 3),
    }


def bare_seconds(count):
    """Seconds of two processes that each do `count` times 10 ms of work at the same time."""
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        processes.map(spin, [1, 1], chunksize=1)  # both have started
        begin = time.perf_counter()
        processes.map(spin, [count, count], chunksize=1)
        return time.perf_counter() - begin


def spin(count):
    for _ in range(count):
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass


def bad_group(pool):
    bad, *good = groups_of(64 * GROUP_SIZE)
    hanging = Completion([1], [0.0], "hang", "stop", (0,))
    bad = RolloutGroup(bad.ticket, bad.prompt, [hanging, *bad.completions[1:]])
    seconds, _ = score(pool, [bad, *good])
    pool.close()
    others = [seconds[group.ticket] for group in good]
    return {"bad": round(seconds[bad.ticket], 3), "others": round(max(others), 3)}


if __name__ == "__main__":
    sys.exit(main())
