"""A GRPO run on Countdown with random weights, as `rlsys grpo` runs it, and its times."""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import yaml
from alone import SO_FAR

from rlsys.config.load import load_config
from rlsys.launch import run
from rlsys.tracking import Tracker, register_tracker

COUNTDOWN = Path(__file__).parents[1] / "examples" / "countdown"
sys.path.insert(0, str(COUNTDOWN))
from problems import generate_problems, write_problems  # noqa: E402

SAMPLE_MS = 200


class Steps(Tracker):
    """The metrics of each step and when it ended, on the clock of time.monotonic."""

    def __init__(self, warm_up, busy, report):
        self._warm_up = warm_up
        self._busy = busy
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
        idle = self._busy.idle_shares(ends[0], ends[-1]) if self._busy else {}
        return summary(self._rows[self._warm_up :], seconds, idle)


class GpuBusy:
    """Percent of time in which a kernel ran on each GPU of this run, as nvidia-smi samples it."""

    def __enter__(self):
        query = ["--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]
        if seen := os.environ.get("CUDA_VISIBLE_DEVICES"):  # nvidia-smi itself does not read it
            query.append(f"--id={seen}")
        self._samples = []
        self._process = subprocess.Popen(
            ["nvidia-smi", *query, f"--loop-ms={SAMPLE_MS}"], stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self):
        for line in self._process.stdout:
            gpu, _, percent = line.partition(",")
            if percent.strip().isdigit():
                self._samples.append((time.monotonic(), int(gpu), int(percent)))

    def idle_shares(self, since, until):
        """{GPU: share of the time between two moments in which no kernel ran}."""
        gpus = sorted({gpu for _, gpu, _ in self._samples})
        return {
            f"GPU {gpu}": 1 - statistics.mean(seen) / 100
            for gpu in gpus
            if (seen := [p for at, g, p in self._samples if g == gpu and since < at <= until])
        }


def write_config(folder, *, model, device, steps, prompts, generations, completion_length, gpus):
    """A config of the Countdown shape and its data; returns the path."""
    problems = generate_problems(
        max(2 * prompts, 512), seed=0, numbers=4, max_number=99, max_target=999, operations="+-*"
    )
    write_problems(folder / "train.jsonl", problems)
    engines = max(1, gpus - 1)
    config = {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "device": device,
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


def run_steps(config_file, options, *, warm_up, report):
    """Run it in this process; returns the summary of its steps.

    `warm_up` steps are left out, 1 at least. `report` gets the summary of the others after each of
    them, for a time limit may come before the next.
    """
    resolved = load_config(config_file, [*options, "--tracking.report_to", "steps"])
    watched = resolved.config.device != "cpu" and shutil.which("nvidia-smi") is not None
    with GpuBusy() if watched else contextlib.nullcontext() as busy:
        steps = Steps(warm_up, busy, report)
        register_tracker("steps")(lambda config, resumed_from: steps)
        run(resolved)
    return steps.summary()


def summary(rows, seconds, idle):
    """Medians of the measured steps, and what a GPU waits."""

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
        "idle_share_by_nvidia_smi": idle,
        "staleness_max": max(row["staleness/max"] for row in rows),
        "logp_difference_mean": median("sampling/logp_difference/mean"),
    }
