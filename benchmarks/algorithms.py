"""Measures what each algorithm learns in the same number of steps, on CPU. Prints JSON.

    python benchmarks/algorithms.py --jobs 2             # everything: most of an hour on two cores
    python benchmarks/algorithms.py --only grpo gspo --steps 30

Every run is `rlsys grpo examples/countdown/demo.yaml` from the demo's warm-started model, with the
options of the variant. Variants differ in nothing else, and a seed draws the same prompts for all.
Accuracy is that of one completion for each held-out problem, sampled at temperature 1. Its standard
error is printed too: differences within it say nothing.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import describe_machine
from rich.console import Console

from rlsys.files import read_jsonl
from rlsys.run.folder import RunDir

COUNTDOWN = Path(__file__).parents[1] / "examples" / "countdown"
sys.path.insert(0, str(COUNTDOWN))
from demo import NUM_TRAIN, warm_started_model  # noqa: E402
from problems import generate_problems, write_problems  # noqa: E402

NUM_HELD_OUT = 512
WARM_START_SEED = 0
ACCURACY, REWARD = "eval/rewards/countdown/mean", "rewards/countdown/mean"
VARIANTS = {
    "grpo": {"grpo.loss_type": "grpo"},
    "dr_grpo": {"grpo.loss_type": "dr_grpo", "grpo.scale_rewards": "none"},
    "dapo": {
        "grpo.loss_type": "dapo",
        "grpo.epsilon_high": 0.28,
        "rollout.dynamic_sample": True,
    },
    "gspo": {
        "grpo.loss_type": "gspo",
        "grpo.epsilon": 3e-4,
        "grpo.epsilon_high": 4e-4,
    },
    "cispo": {"grpo.loss_type": "cispo", "grpo.epsilon_high": 5.0},
    "rloo": {"grpo.loss_type": "grpo", "grpo.advantage_estimator": "rloo"},
    "grpo, max_staleness 1": {"grpo.loss_type": "grpo", "rollout.max_staleness": 1},
    "grpo, max_staleness 4": {"grpo.loss_type": "grpo", "rollout.max_staleness": 4},
}
"""The options that make the demo's config the variant; grpo is that of max_staleness 0 too."""


def main():
    arguments = parse_arguments()
    machine = describe_machine()
    data = arguments.runs / "countdown-data"
    train, held_out = data / "train.jsonl", data / f"validation-{NUM_HELD_OUT}.jsonl"
    write_problems(train, generate_problems(NUM_TRAIN, seed=0))
    write_problems(held_out, generate_problems(NUM_HELD_OUT, seed=0, held_out=True))
    console = Console(stderr=True)
    model = warm_started_model(arguments.runs, data, WARM_START_SEED, console)
    common = {
        "model.path": model,
        "data.dataset": train,
        "data.val_dataset": held_out,
        "data.max_eval_prompts": NUM_HELD_OUT,
        "max_steps": arguments.steps,
        "eval_steps": arguments.steps,
        "tracking.report_to": "[]",
        "checkpoint.save_steps": "null",
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {
            (variant, seed): pool.submit(run, variant, seed, common, arguments.runs, console)
            for seed in arguments.seeds
            for variant in arguments.only or VARIANTS
        }
    results = {key: future.result() for key, future in runs.items()}
    table = {}
    for variant in arguments.only or VARIANTS:
        by_seed = {seed: results[variant, seed] for seed in arguments.seeds}
        gains = [result["after"] - result["before"] for result in by_seed.values()]
        table[variant] = {
            "options": VARIANTS[variant],
            "seeds": by_seed,
            "mean_gain": round(statistics.fmean(gains), 4),
            "gains": [round(gain, 4) for gain in gains],
        }
    print(
        json.dumps(
            {
                "machine": machine,
                "steps": arguments.steps,
                "jobs_at_once": arguments.jobs,
                "held_out_problems": NUM_HELD_OUT,
                "standard_error_of_an_accuracy_of_a_half": round(0.5 / math.sqrt(NUM_HELD_OUT), 4),
                "variants": table,
            },
            indent=2,
        )
    )


def run(variant, seed, common, runs, console):
    """Run GRPO once; returns its accuracy before and after, and the metrics of its steps."""
    name = variant.replace(", ", "-").replace(" ", "-")
    folder = RunDir(runs / "algorithms" / f"{name}-seed{seed}-{int(time.time())}")
    options = common | VARIANTS[variant] | {"seed": seed, "output_dir": folder.path}
    command = [sys.executable, "-m", "rlsys.cli", "grpo", str(COUNTDOWN / "demo.yaml")]
    for field, value in options.items():
        command += [f"--{field}", str(value)]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{variant}, seed {seed}, failed:\n{done.stdout[-4000:]}")
    rows = list(read_jsonl(folder.metrics))
    evaluations = [row[ACCURACY] for row in rows if ACCURACY in row]
    steps = [row for row in rows if REWARD in row]
    console.print(f"{variant}, seed {seed}: {evaluations[0]:.3f} -> {evaluations[-1]:.3f}")
    return {
        "before": evaluations[0],
        "after": evaluations[-1],
        "training_accuracy_last_10_steps": round(
            statistics.fmean(row[REWARD] for row in steps[-10:]), 4
        ),
        "median_step_seconds": round(statistics.median(row["time/step"] for row in steps), 3),
        "minutes": round((time.monotonic() - start) / 60, 2),
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder to write to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
