"""Measures what running ahead of the policy gains, on CPU. Prints JSON.

    python benchmarks/async_overlap.py                          # the demo's config, 6 steps each
    python benchmarks/async_overlap.py --steps 10 --rollout.max_completion_length 128

Runs what `rlsys grpo examples/countdown/demo.yaml` runs, with the untrained starter model, once for
every value of rollout.max_staleness, and compares the seconds of a step with those of its rollout
and its update taken one after the other. The first steps are left out. Policy and engine have a
thread each, so it needs two idle cores. Any further option is one of `rlsys grpo`.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

from grpo_step_cpu import COUNTDOWN, prepare
from machine import describe_machine

from rlsys.config.load import load_config
from rlsys.files import read_jsonl
from rlsys.launch import run
from rlsys.run.folder import RunDir

WARM_UP_STEPS = 3
KEYS = (
    "time/step",
    "time/rollout",
    "time/policy_update",
    "time/weight_sync",
    "idle/policy_frac",
    "idle/rollout_frac",
    "staleness/mean",
    "staleness/max",
    "num_completion_tokens",
)


def main():
    machine = describe_machine()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run")
    parser.add_argument("--max_staleness", type=int, nargs="+", default=[0, 1, 2])
    arguments, overrides = parser.parse_known_args()
    results = {}
    for max_staleness in arguments.max_staleness:
        staleness = ["--rollout.max_staleness", str(max_staleness)]
        results[f"max_staleness {max_staleness}"] = measure(arguments.steps, overrides + staleness)
    print(json.dumps({"machine": machine, "options": overrides, "medians": results}, indent=2))


def measure(steps, overrides):
    """Medians over the measured steps of one run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = prepare(Path(folder), WARM_UP_STEPS + steps)
        options[options.index("cpu_seconds") - 1 :] = [
            "--tracking.report_to"
        ]  # without a value: none
        run(load_config(COUNTDOWN / "demo.yaml", options + overrides))
        rows = list(read_jsonl(RunDir(Path(folder) / "run").metrics))[WARM_UP_STEPS:]
    medians = {key: statistics.median(row[key] for row in rows) for key in KEYS}
    in_turns = medians["time/step"] - medians["time/rollout"]
    return medians | {"without rollout": in_turns}


if __name__ == "__main__":
    main()
