"""Measures what all that keeps a run alive costs while nothing fails. Prints JSON.

    python benchmarks/reliability_cost.py                        # everything, the demo's steps
    python benchmarks/reliability_cost.py --parts snapshots      # one part alone
    python benchmarks/reliability_cost.py --pairs 20
    python benchmarks/reliability_cost.py --shape qwen2.5-1.5b --gpus 2 \\
        --parts heartbeats snapshots finiteness guards

One run of the demo's config, with the untrained starter model, or of random weights of a larger
shape on GPUs: 64 prompts x 8 completions of up to 512 tokens. Blocks of steps in which it is all on
take turns with blocks in which it is all off, so that both meet the same machine:

- heartbeats: pings of every actor,
- snapshots: copies of weights and optimizer state in Ray's object store, and the batches since,
- finiteness: checks of log-probs, loss, gradients, snapshots and weights that are sent,
- guards: the processes that clean up after actors; they are stopped meanwhile,
- checkpoints: one every `--save_steps` steps, written in the background, with sums and a manifest.

CPU seconds count all processes of the run. They depend less on what else the machine does
than seconds on the clock, and the demo's processes wait for each other: a step's CPU seconds are
nearly its seconds on an idle core. The intervals are bootstrapped over pairs of blocks.
"""

import argparse
import contextlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import ray
import torch
from grpo_run import write_config
from grpo_step_cpu import COUNTDOWN, prepare
from machine import describe_machine
from random_model import SHAPES, save_random_model

from rlsys.config.load import load_config
from rlsys.launch import Method, fit_to_data, load_data, run_method, start_system, train_system
from rlsys.tracking import Tracker, register_tracker

WARM_UP_STEPS = 4
PARTS = ("heartbeats", "snapshots", "finiteness", "guards", "checkpoints")
RESAMPLES = 2000


class Switch:
    """Turns parts of a run on and off, and measures each block of steps."""

    def __init__(self, parts, steps_of_block, save_steps):
        self.parts, self.steps_of_block, self.save_steps = parts, steps_of_block, save_steps
        self.blocks = {True: [], False: []}
        """Whether it was on -> seconds and CPU seconds a step of each block."""
        self.is_on = True
        self._step, self._before = 0, None

    def begin(self, system, checkpoints):
        """Take what is to be switched, once everything has started."""
        self._system, self._checkpoints = system, checkpoints
        self._save, checkpoints.after_step = checkpoints.after_step, self._save_if_due
        self._guards = guards()
        self._watched = system.restarts.heartbeats._groups

    def log_metrics(self, step):
        """Called at the end of each step."""
        self._step = step - WARM_UP_STEPS
        if self._step < 0 or self._step % self.steps_of_block:
            return
        now = time.monotonic(), self._cpu_seconds()
        if self._before is not None:
            per_step = [
                (b - a) / self.steps_of_block for a, b in zip(self._before, now, strict=True)
            ]
            self.blocks[self.is_on].append(per_step)
        self.turn(on=not self.is_on)
        self._before = time.monotonic(), self._cpu_seconds()

    def turn(self, *, on):
        """Turn everything on or off."""
        if on == self.is_on:
            return
        self.is_on = on
        system, parts = self._system, self.parts
        if "heartbeats" in parts:
            heartbeats = system.restarts.heartbeats
            heartbeats._groups = self._watched if on else [(Nobody(), 30.0)]
        if "snapshots" in parts:
            system.policy.restarts = system.restarts if on else None
        if "finiteness" in parts:
            actors = system.policy.actors.values()
            ray.get([actor.__ray_call__.remote(switch_checks, on) for actor in actors])
        if "guards" in parts:
            for process in self._guards:
                process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def _save_if_due(self, step):
        due = self.is_on and self._step % self.steps_of_block % self.save_steps == 0
        if "checkpoints" in self.parts and self._step >= 0 and due:
            self._save(step)

    def _cpu_seconds(self):
        used = 0.0
        for process in {
            psutil.Process(),
            *psutil.Process().children(recursive=True),
            *self._guards,
        }:
            with contextlib.suppress(psutil.NoSuchProcess):
                used += sum(process.cpu_times()[:2])
        return used


class Steps(Tracker):
    """Tells a switch when a step is over."""

    def __init__(self, switch):
        self._switch = switch

    def log_metrics(self, step, metrics):
        self._switch.log_metrics(step)

    def close(self):
        pass


def switch_checks(rank, on):
    """In a policy rank: leave out the checks for numbers that are not finite, or do them again."""
    import rlsys.engines.megatron.policy as policy
    from rlsys.weight_sync import checksum

    owners = dict.fromkeys(NO_CHECKS, policy) | {"_has_nonfinite": checksum}
    if not on:
        rank.checks = {name: getattr(owner, name) for name, owner in owners.items()}
    for name, owner in owners.items():
        setattr(owner, name, rank.checks[name] if on else NO_CHECKS[name])


NO_CHECKS = {
    "count_nonfinite": lambda *_: {},
    "find_nonfinite": lambda *_, **__: {},
    "check_finite": lambda *_: None,
    "_has_nonfinite": lambda values: torch.zeros((), dtype=torch.bool, device=values.device),
}


class Nobody:
    """A group without actors, in place of one that is not to be watched."""

    def watched(self):
        return []


def guards():
    """The guards of this process and of its actors."""
    family = {str(one.pid) for one in psutil.Process().children(recursive=True)}
    family.add(str(psutil.Process().pid))
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.endswith("leftovers.py") for word in process.info["cmdline"] or ())
        and process.info["cmdline"][-1] in family
    ]


def main():
    machine = describe_machine()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pairs", type=int, default=12, help="of a block that is on and one off")
    parser.add_argument("--steps", type=int, default=6, help="of a block")
    parser.add_argument("--save_steps", type=int, default=3, help="as the demo's auto decides")
    parser.add_argument("--shape", choices=SHAPES, help="on GPUs; default: the demo's, on CPU")
    parser.add_argument("--gpus", type=int, choices=[1, 2], default=1, help="with --shape")
    arguments, overrides = parser.parse_known_args()
    switch = Switch(arguments.parts, arguments.steps, arguments.save_steps)
    register_tracker("steps")(lambda config, resumed_from: Steps(switch))

    def train(system, tracker, checkpoints, health):
        switch.begin(system, checkpoints)
        try:
            return train_system(system, tracker, checkpoints, health)
        finally:
            switch.turn(on=True)

    steps = WARM_UP_STEPS + 2 * arguments.pairs * arguments.steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        path, options = prepared(Path(folder), arguments, steps)
        config = load_config(path, options + overrides).config
        run_method(config, Method(load_data, fit_to_data, start_system, train))
    print(json.dumps({"machine": machine} | vars(arguments) | summary(switch.blocks), indent=1))


def prepared(folder, arguments, steps):
    """Path of the config, and options; it saves after every step for which the switch asks."""
    if arguments.shape is None:
        return COUNTDOWN / "demo.yaml", prepare(folder, steps, tracker="steps", save_steps="1")
    model = folder / "model"
    # In another process: CUDA's context would stay on a GPU of the actors.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        other.submit(save_random_model, model, arguments.shape, "cuda", endless=True).result()
    path = write_config(
        folder,
        model=model,
        device="cuda",
        steps=steps,
        prompts=64,
        generations=8,
        completion_length=512,
        gpus=arguments.gpus,
    )
    return path, ["--tracking.report_to", "steps", "--checkpoint.save_steps", "1"]


def summary(blocks):
    """Medians of both, and by how many percent a step is longer with everything on."""
    pairs = list(zip(blocks[True], blocks[False], strict=False))
    result = {"measured_pairs": len(pairs)}
    for index, name in enumerate(("seconds", "cpu_seconds")):
        on, off = ([block[which][index] for block in pairs] for which in (0, 1))
        result[f"{name}_a_step"] = {"on": statistics.median(on), "off": statistics.median(off)}
        drawing = random.Random(0)
        drawn = sorted(
            cost([drawing.choice(pairs) for _ in pairs], index) for _ in range(RESAMPLES)
        )
        result[f"{name}_cost_percent"] = {
            "all": cost(pairs, index),
            "interval_of_90_percent": [drawn[RESAMPLES // 20], drawn[-RESAMPLES // 20]],
        }
    return result


def cost(pairs, index):
    """Percent, of the sums over all blocks."""
    on, off = (sum(pair[which][index] for pair in pairs) for which in (0, 1))
    return 100 * (on / off - 1)


if __name__ == "__main__":
    main()
