"""Shows where the seconds of the demo's GRPO steps go, on CPU. Prints JSON.

    python benchmarks/grpo_step_cpu.py                        # the demo's config, 5 steps
    python benchmarks/grpo_step_cpu.py --steps 9 --grpo.beta 0.001

Runs what `rlsys grpo examples/countdown/demo.yaml` runs, with the untrained starter model. That
seldom ends a completion, so all steps are alike and sample about as many tokens as the config
allows. Any further option is one of `rlsys grpo`. The first steps are left out.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from machine import actor_processes, cpu_seconds, describe_machine

from rlsys.config.load import load_config
from rlsys.files import read_jsonl
from rlsys.launch import run
from rlsys.run.folder import RunDir
from rlsys.tracking import Tracker, register_tracker

COUNTDOWN = Path(__file__).parents[1] / "examples" / "countdown"
sys.path.insert(0, str(COUNTDOWN))
from problems import generate_problems, write_problems  # noqa: E402
from starter_model import write_starter_model  # noqa: E402

ACTORS = {"policy": "PolicyRank", "rollout engine": "RolloutActor", "reward worker": "RewardWorker"}
WARM_UP_STEPS = 2
NUM_PROBLEMS = 512


class CpuSeconds(Tracker):
    """CPU seconds that the processes of each role have used by the end of every step."""

    def __init__(self):
        self.after_step = []

    def log_metrics(self, step, metrics):
        used = {role: cpu_seconds(actor_processes(name)) for role, name in ACTORS.items()}
        self.after_step.append(used | {"driver": time.process_time()})

    def close(self):
        pass


def main():
    machine = describe_machine()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    arguments, overrides = parser.parse_known_args()
    cpu = CpuSeconds()
    register_tracker("cpu_seconds")(lambda config, resumed_from: cpu)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = prepare(Path(folder), WARM_UP_STEPS + arguments.steps) + overrides
        resolved = load_config(COUNTDOWN / "demo.yaml", options)
        run(resolved)
        steps = list(read_jsonl(RunDir(Path(folder) / "run").metrics))
    result = summary(resolved.config, steps[WARM_UP_STEPS:])
    result["median_cpu_seconds"] = {
        role: statistics.median(
            after[role] - before[role]
            for before, after in pairwise(cpu.after_step[WARM_UP_STEPS - 1 :])
        )
        for role in cpu.after_step[0]
    }
    print(json.dumps({"machine": machine, "options": overrides} | result, indent=2))


def prepare(folder, max_steps, *, tracker="cpu_seconds", save_steps="null"):
    """Data and model; returns the options of `rlsys grpo` for a run with them."""
    write_problems(folder / "train.jsonl", generate_problems(NUM_PROBLEMS, seed=0))
    write_starter_model(folder / "model", seed=0)
    return [
        *("--output_dir", str(folder / "run")),
        *("--model.path", str(folder / "model")),
        *("--data.dataset", str(folder / "train.jsonl")),
        "--data.val_dataset",  # without a value: none
        *("--max_steps", str(max_steps), "--eval_steps", "null"),
        *("--tracking.report_to", tracker),
        *("--checkpoint.save_steps", save_steps),
    ]


def summary(config, steps):
    def median(value_of_step):
        return statistics.median(value_of_step(step) for step in steps)

    phases = [key for key in steps[0] if key.startswith("time/") and key != "time/step"]
    return {
        "config": {
            "completions_a_step": config.rollout.generation_batch_size,
            "max_completion_length": config.rollout.max_completion_length,
            "optimizer_steps_a_rollout": config.optimizer_steps_per_update,
            "beta": config.grpo.beta,
            "dtype": config.model_dtype(on_cpu=True),
            "policy_ranks": config.policy.world_size,
            "rollout_engines": config.rollout.num_engines,
        },
        "measured_steps": len(steps),
        "prompt_tokens_a_step": median(lambda step: step["num_prompt_tokens"]),
        "completion_tokens_a_step": median(lambda step: step["num_completion_tokens"]),
        "steps_per_second": 1 / median(lambda step: step["time/step"]),
        "step_seconds": [step["time/step"] for step in steps],
        "median_seconds": {
            key.removeprefix("time/"): median(lambda step, key=key: step[key])
            for key in ["time/step", *phases]
        },
        "median_tokens_per_second": {
            name: median(lambda step, name=name: step[f"{name}/tokens_per_second"])
            for name in ("rollout", "update")
        },
        "median_ratios": {
            f"{key.removeprefix('time/')} / step": median(
                lambda step, key=key: step[key] / step["time/step"]
            )
            for key in phases
        }
        | {
            "outside of phases / step": median(
                lambda step: 1 - sum(step[key] for key in phases) / step["time/step"]
            ),
            "rollout / policy_update": median(
                lambda step: step["time/rollout"] / step["time/policy_update"]
            ),
            "weight_sync / policy_update": median(
                lambda step: step["time/weight_sync"] / step["time/policy_update"]
            ),
        },
    }


if __name__ == "__main__":
    main()
