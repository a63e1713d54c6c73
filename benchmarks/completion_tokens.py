"""Measures what tracking.completion_tokens costs a step, and how much it writes. Prints JSON.

    python benchmarks/completion_tokens.py        # 1,024 completions of 1,000 tokens

Token ids are Zipf-distributed and log-probs exponential, which compress about as real ones do:
random log-probs are what costs. `cpu_s` changes less than `wall_s` on a busy machine.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine

from rlsys.run.folder import RunDir
from rlsys.tracking.tokens import TokensTracker, tokens_path
from rlsys.types import Completion, Prompt, RolloutGroup, TrainBatch

STEP_S = 30
PROMPT_TOKENS, GROUP = 100, 8


def main():
    arguments = parse_arguments()
    groups, batch = random_batch(arguments.completions, arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        tracker = TokensTracker(run)
        results = [measure(tracker, step, groups, batch) for step in range(arguments.repeats)]
        size = tokens_path(run, 0).stat().st_size
    best = {name: min(result[name] for result in results) for name in ("wall_s", "cpu_s")}
    result = {
        "machine": describe_machine(),
        "tokens": arguments.completions * arguments.tokens,
        "bytes_per_token": round(size / arguments.completions / arguments.tokens, 2),
        "steps": results,
        "percent_of_30_s": {n: round(100 * value / STEP_S, 2) for n, value in best.items()},
    }
    print(json.dumps(result, indent=2))


def measure(tracker, step, groups, batch):
    wall, cpu = time.perf_counter(), time.process_time()
    tracker.log_tokens(step, groups, batch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}


def random_batch(completions, tokens):
    generator = np.random.default_rng(0)
    shape = (completions, PROMPT_TOKENS + tokens)
    ids = np.minimum(generator.zipf(1.3, shape), 150_000)
    rollout = torch.from_numpy(-generator.exponential(0.4, shape)).float()
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, PROMPT_TOKENS:] = True
    batch = TrainBatch(
        input_ids=torch.from_numpy(ids),
        lengths=torch.full(shape[:1], shape[1]),
        completion_mask=mask,
        advantages=torch.randn(completions, 1).expand(shape),
        rollout_logprobs=rollout,
        old_logprobs=rollout + 0.001 * torch.randn(shape),
    )
    prompt = Prompt("0", [{"role": "user", "content": ""}], [0] * PROMPT_TOKENS)
    sampled = [Completion([], [], "", "stop", (0,))] * GROUP
    count = completions // GROUP
    return [RolloutGroup(i, prompt, sampled, group_id=i) for i in range(count)], batch


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
