"""Reward functions that do what a script may, and a Ray actor's method or a daemon may not."""

PROGRAMS = """
import asyncio, multiprocessing, os, signal, threading, time
from concurrent.futures import ProcessPoolExecutor
from math_verify import parse, verify
from rlsys.rewards import register_reward
from helper_beside import double

def work(text):
    return float(len(text))

def pooled(completions, method, function=work):
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        return pool.map(function, completions)

@register_reward("verifies")
async def verifies(completions, **columns):
    await asyncio.sleep(0)
    gold = parse("$2$")
    return [float(verify(gold, parse(text))) for text in completions]

@register_reward("alarm")
def alarm(completions, **columns):
    caught = []
    signal.signal(signal.SIGALRM, lambda *_: caught.append(1.0))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while not caught:
        time.sleep(0.01)
    assert threading.current_thread() is threading.main_thread()
    return caught * len(completions)

@register_reward("forks")
def forks(completions, **columns):
    return pooled(completions, "fork")

@register_reward("spawns")
def spawns(completions, **columns):
    return pooled(completions, "spawn", double)

@register_reward("executes")
async def executes(completions, **columns):
    loop, context = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return [await loop.run_in_executor(pool, work, text) for text in completions]

@register_reward("hangs")
def hangs(completions, **columns):
    with multiprocessing.Pool(2) as pool:
        pool.map(wait_for_ever, completions)

def wait_for_ever(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(3600)
"""
SIBLING = "def double(text):\n    return 2.0 * len(text)\n"
PROGRAM_COMPLETIONS = ("\\boxed{2}", "\\boxed{3}.")
PROGRAM_VALUES = {
    "verifies": [1.0, 0.0],
    "alarm": [1.0, 1.0],
    "forks": [9.0, 10.0],
    "spawns": [18.0, 20.0],
    "executes": [9.0, 10.0],
}
"""Of PROGRAM_COMPLETIONS, by function."""
