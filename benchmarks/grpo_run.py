"""A GRPO run on Countdown with random weights, as `rlsys grpo` runs it, and its times."""

import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import yaml
from alone import SO_FAR
from gpu_watch import watched_gpus

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batching import build_train_batch
from rlsys.config.load import load_config
from rlsys.launch import Method, run_method, train_system
from rlsys.preflight.before_start import fit_to_data, load_data
from rlsys.system import start_system
from rlsys.tracking import Tracker, register_tracker

COUNTDOWN = Path(__file__).parents[1] / "examples" / "countdown"
sys.path.insert(0, str(COUNTDOWN))
from problems import generate_problems, write_problems  # noqa: E402


class Steps(Tracker):
    """The metrics of each step and when it ended, on the clock of time.monotonic."""

    def __init__(self, warm_up, gpus, report):
        self._warm_up = warm_up
        self._gpus = gpus
        self._report = report
        self._rows = []
        self._ends = []

    def log_metrics(self, step, metrics):
        self._rows.append(metrics)
        self._ends.append(time.monotonic())
        if len(self._rows) > self._warm_up:
            self._report(self.summary() | {SO_FAR: True})

    def close(self):
        pass

    def summary(self):
        """Medians of the measured steps.

        A step lasts from the end of the step before to its own end, so nothing is left out.
        """
        ends = self._ends[self._warm_up - 1 :]
        seconds = [end - start for start, end in pairwise(ends)]
        rows = self._rows[self._warm_up :]
        return summary(rows, seconds) | self._gpus.between(ends[0], ends[-1])


def write_config(folder, *, model, device, steps, prompts, generations, completion_length, gpus):
    """A config of the Countdown shape and its data; returns the path.

    Policy and engine take turns if there is one GPU.
    """
    problems = generate_problems(
        max(2 * prompts, 512), seed=0, numbers=4, max_number=99, max_target=999, operations="+-*"
    )
    write_problems(folder / "train.jsonl", problems)
    engines = max(1, gpus - 1)
    config = {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "device": device,
        **({"placement": "colocated"} if gpus == 1 else {}),
        "data": {"dataset": [str(folder / "train.jsonl")], "max_prompt_length": 256},
        "model": {"path": str(model)},
        "rollout": {
            "num_engines": engines,
            "num_generations": generations,
            "generation_batch_size": prompts * generations,
            "max_completion_length": completion_length,
            "max_num_seqs": min(512, -(-prompts * generations // engines)),
        },
        "reward": {"reward_funcs": ["countdown", "format"], "num_workers": 2},
        "grpo": {"beta": 0.0, "loss_type": "dapo"},
        "policy": {"max_tokens_per_micro_batch": 16384, "lr": 1.0e-6},
        "tracking": {"report_to": []},
        "checkpoint": {"save_steps": None},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def run_steps(config_file, options, *, warm_up, report, alone=False):
    """Run it in this process; returns the summary of its steps.

    `warm_up` steps are left out, 1 at least. `report` gets the summary of the others after each of
    them, for a time limit may come before the next. With `alone` the phases of one more step run
    afterwards, each without what a step does between them.
    """
    resolved = load_config(config_file, [*options, "--tracking.report_to", "steps"])
    measured = {}

    def train(system, tracker, checkpoints, health):
        train_system(system, tracker, checkpoints, health)
        if alone:
            measured.update(against_alone(steps.summary(), phases_alone(system)))
            report(steps.summary() | measured)

    with watched_gpus(resolved.config.device) as gpus:
        steps = Steps(warm_up, gpus, report)
        register_tracker("steps")(lambda config, resumed_from: steps)
        run_method(resolved.config, Method(load_data, fit_to_data, start_system, train))
    return steps.summary() | measured


def phases_alone(system):
    """Seconds of sampling, of an update and of a weight sync that wait for nothing else.

    Engines are awake before they sample. An update comes right after another, so that nothing has
    to come to the GPU. A sync is its transport, without changes of turns.
    """
    config = system.config
    start = time.perf_counter()
    groups = system.rollouts.next_batch(config.num_steps + 1)
    rollout_s = time.perf_counter() - start
    batch = build_train_batch(groups)
    batch.advantages = compute_advantages(groups, batch, config.grpo, config.reward.reward_weights)
    system.policy.update(batch)
    start = time.perf_counter()
    system.policy.update(batch)
    update_s = time.perf_counter() - start
    sync_s = system.publisher.publish()["weight_sync/transport_seconds"]
    return {"rollout": rollout_s, "policy_update": update_s, "weight_sync": sync_s}


def against_alone(result, seconds):
    """The phases alone, and what a step takes besides them; the goal on one GPU is 1.15."""
    ratio = result["step_s"] / sum(seconds.values())
    return {"phases_alone_s": seconds, "step over sum of phases alone": ratio}


def summary(rows, seconds):
    """Medians of the measured steps."""

    def median(key):
        return statistics.median(row[key] for row in rows)

    tokens = median("num_completion_tokens")
    step = statistics.median(seconds)
    return {
        "measured_steps": len(rows),
        "step_s": step,
        "step_s_of_each": seconds,
        "completion_tokens": tokens,
        "completion_tokens_per_second": tokens / step,
        "phases_s": {
            key.removeprefix("time/"): median(key) for key in rows[0] if key.startswith("time/")
        },
        "rollout_tokens_per_second": median("rollout/tokens_per_second"),
        "update_tokens_per_second": median("update/tokens_per_second"),
        "idle_share_of_policy": median("idle/policy_frac"),
        "idle_share_of_rollout": median("idle/rollout_frac"),
        # Seconds of changes of turns, which are a part of the phases; only on shared GPUs.
        **{key: median(key) for key in rows[0] if key.startswith("colocated/")},
        "staleness_max": max(row["staleness/max"] for row in rows),
        "logp_difference_mean": median("sampling/logp_difference/mean"),
    }
