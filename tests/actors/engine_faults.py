"""Faults of a rollout engine, planned inside its own process: at a moment, with a real signal."""

import os
import signal
import time

import psutil
import ray

HANG = 0
SIGNALS = {"hang": HANG, "kill": signal.SIGKILL, "stop": signal.SIGSTOP}
MOMENTS = ("sampling", "pausing", "transfer", "answering")
FOREVER_S = 3600.0
STEPS_BEFORE = 5
"""Steps of sampling before the fault comes."""


def plan_fault(actor, moment, how):
    """Let this engine's process fail by a signal, or its loop hang, when it comes to a moment."""
    ray.get(actor.__ray_call__.remote(_plan, moment, SIGNALS[how]))


def process_of(actor):
    """The process id of an actor."""
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


def workers_of(actor):
    """The process ids of the worker processes of an engine with tensor parallelism."""
    return ray.get(actor.__ray_call__.remote(_workers))


def _workers(_):
    children = psutil.Process().children(recursive=True)
    return sorted(one.pid for one in children if "VLLM::Worker" in " ".join(one.cmdline()))


def _plan(actor, moment, number):
    def fail(*_):
        if number == HANG:
            time.sleep(FOREVER_S)
        os.kill(os.getpid(), number)

    def plan(engine):
        if moment == "sampling":
            steps = iter(range(STEPS_BEFORE))
            _before(engine, "step", lambda *_: None if next(steps, None) is not None else fail())
        elif moment == "pausing":
            _before(engine, "start_weight_update", fail)
        elif moment == "transfer":
            from rlsys.weight_sync.receiver import WeightReceiver

            _before(WeightReceiver, "_arrived", fail)
        else:
            update = engine.update_weights
            engine.update_weights = lambda version: (update(version), fail())

    actor._loop.call(plan).result()


def _before(owner, name, act):
    method = getattr(owner, name)

    def wrapped(*args):
        act()
        return method(*args)

    setattr(owner, name, wrapped)
