"""The steps of long_tail.py on vLLM's CPU engine, next to the same steps simulated."""

import argparse
import os
import queue
import statistics
import tempfile
import threading
import time
from pathlib import Path

from long_tail import COOL_DOWN, WARM_UP, Lengths, make_config, on_lines, simulate
from random_model import save_random_model
from simulated_rollouts import run_steps

from rlsys.rollout.clock import Clock
from rlsys.types import Prompt, SampleRequest

PROMPTS, GENERATIONS, MEDIAN, LONGEST, TAIL = 8, 8, 24, 240, 10.0
CALIBRATED = (1, 8, 32, 64, 128)
"""Sequences whose decode steps are measured."""
CALIBRATION_TOKENS = 32
STEPS = 6


def validate(arguments):
    """Seconds of a step for real and simulated, and their ratio, by max_staleness."""
    from rlsys.engines.vllm.settings import rollout_env

    os.environ.update(rollout_env("cpu"))
    own = argparse.Namespace(**vars(arguments))
    own.num_generations, own.median, own.longest = GENERATIONS, MEDIAN, LONGEST
    own.engines, own.steps, own.max_num_seqs = 1, STEPS, max(CALIBRATED)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_random_model(model, "tiny", "cpu", endless=True)
        return {
            f"max_staleness {staleness}": compare(
                make_config(own, PROMPTS, {"max_staleness": staleness}), model
            )
            for staleness in (0, 1)
        }


def compare(config, model):
    """The same steps for real and simulated."""
    # All completions of a request have one length here: vLLM's limit of tokens.
    lengths = Lengths(MEDIAN, TAIL, LONGEST, within=0.0)
    world = RealWorld(config, model, lengths)
    times = calibrate(world)
    in_turns = simulate(config, lengths, lambda n: on_lines(times, n), lambda n: 0.01)
    update_s = statistics.median(step["seconds"] for step in in_turns)
    real = run_steps(config, world, lambda n: update_s)
    world.close()
    simulated = simulate(config, lengths, lambda n: on_lines(times, n), lambda n: update_s)
    measured = slice(WARM_UP, -COOL_DOWN)
    real_s = statistics.fmean(step["seconds"] for step in real[measured])
    simulated_s = statistics.fmean(step["seconds"] for step in simulated[measured])
    return {
        "step_ms": {number: 1e3 * value for number, value in times.items()},
        "update_s": update_s,
        "real_s": real_s,
        "simulated_s": simulated_s,
        "real / simulated": real_s / simulated_s,
    }


def calibrate(world):
    """Seconds of a decode step by the number of sequences."""

    def seconds(engine, number):
        world.limit = CALIBRATION_TOKENS
        prompt = Prompt(f"calibration {number}", [], [3, 4, 5, 6])
        engine.add([SampleRequest(10**6 + i, prompt, 1, 1.0, i) for i in range(number)])
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        world.limit = None
        return (time.perf_counter() - start) / CALIBRATION_TOKENS

    def all_of_them(engine):
        seconds(engine, 8)  # a first time takes longer
        return {number: seconds(engine, number) for number in CALIBRATED}

    return world.loop.call(all_of_them).result()


class RealWorld(Clock):
    """One vLLM engine in a thread of this process, in the time of the clock; as World."""

    sequence_seconds = 0.0

    def __init__(self, config, model, lengths):
        from rlsys.engines.loop import EngineLoop
        from rlsys.engines.vllm import engine as engines

        self.limit = None
        """Tokens of every completion, in place of `lengths`."""
        self._finished = queue.SimpleQueue()
        self._arrived = threading.Event()
        self._pending = set()
        attempts = {}
        usual = engines.sampling_arguments

        def with_length(rollout, stops, request):
            name = request.prompt.prompt_id
            attempts[name] = attempts.get(name, -1) + 1
            tokens = self.limit or lengths(name, attempts[name], 1)[0]
            return usual(rollout, stops, request) | {"max_tokens": tokens}

        engines.sampling_arguments = with_length
        own = config.model_copy(
            update={"model": config.model.model_copy(update={"path": str(model)}), "device": "cpu"}
        )
        self.loop = EngineLoop(
            lambda: engines.VLLMEngine(str(model), config=own, device="cpu", engine_rank=0)
        )
        self._undo = lambda: setattr(engines, "sampling_arguments", usual)

    @property
    def now(self):
        return time.monotonic()

    def submit(self, requests):
        self._pending |= {request.ticket for request in requests}
        self.loop.sample(requests, self._end)

    def _end(self, outcome):
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            self._finished.put(outcome)
            self._arrived.set()

    def abort(self, tickets):
        self._pending -= set(tickets)
        self.loop.abort(list(tickets)).result()

    @property
    def num_pending(self):
        return len(self._pending)

    def bring_back(self):
        return False

    def pending_refs(self):
        return []

    def collect(self):
        self._arrived.clear()
        groups = []
        while not self._finished.empty():
            group = self._finished.get()
            if group.ticket in self._pending:
                self._pending.remove(group.ticket)
                groups.append(group)
        return groups

    def publish(self, version):
        self.loop.call(lambda engine: engine._begin_version(version)).result()

    def pass_seconds(self, seconds):
        time.sleep(seconds)

    def wait(self, refs, *, timeout_s):
        if not refs:  # else there are rewards, which are ready at once
            self._arrived.wait(timeout_s)

    def close(self):
        self._undo()
        self.loop.close()
