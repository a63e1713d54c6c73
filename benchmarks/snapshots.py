"""Measures what snapshots of the policy cost, and a restart from one. Prints JSON.

    python benchmarks/snapshots.py                                    # SmolLM2-135M's shape, CPU
    python benchmarks/snapshots.py --device cuda --shape qwen2.5-1.5b --ranks 2

Supervised updates of random rows by the actors of a run. The wait is what the next call to the
ranks would wait for the snapshot: at once after the update, and when the ranks had `--idle`
seconds, as while engines sample. Then a rank is killed, and the same update is done again.
"""

import argparse
import json
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import ray
import torch
from machine import describe_machine
from random_model import SHAPES, save_random_model

from rlsys.actors.placement import Placement
from rlsys.actors.policy import PolicyActors, PolicyRank
from rlsys.actors.ray_session import ray_session
from rlsys.actors.recovery import Restarts
from rlsys.config import SftConfig
from rlsys.types import TrainBatch


class KillableRank(PolicyRank):
    """A rank that ends when asked to."""

    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder, ray_session(log_to_driver=False):
        save_random_model(Path(folder), arguments.shape, arguments.device)
        config = config_of(folder, arguments)
        place = partial(Placement(config, device=arguments.device).options, "policy")
        policy = PolicyActors(config, device=arguments.device, place=place, rank_class=KillableRank)
        restarts = Restarts(config.recovery)
        policy.start()
        restarts.watch(policy, None)
        results = measure(policy, arguments)
        restarts.close()
    print(json.dumps({"machine": describe_machine(), **vars(arguments), **results}, indent=2))


def measure(policy, arguments):
    """Seconds of updates, of waits for their snapshots, and of a restart."""
    shape = (arguments.rows, arguments.tokens)
    batch = TrainBatch(
        input_ids=torch.randint(10, SHAPES[arguments.shape].vocabulary, shape),
        lengths=torch.full(shape[:1], shape[1]),
        completion_mask=torch.ones(shape, dtype=torch.bool),
        advantages=torch.zeros(shape),
        rollout_logprobs=torch.zeros(shape),
    )
    results = {"update_s": [], "wait_s": []}
    for _ in range(arguments.updates):
        results["update_s"].append(seconds(partial(policy.update, batch)))
        results["wait_s"].append(seconds(policy.call_once, "finished_version"))
    policy.update(batch)
    time.sleep(arguments.idle)
    results["wait_after_idle_s"] = seconds(policy.call_once, "finished_version")
    states = policy.snapshots.newest.states.values()
    results["gib"] = sum(ray.get(state).num_bytes for state in states) / 2**30
    policy.actors["policy rank 0"].end.remote()
    results["update_with_restart_s"] = seconds(policy.update, batch)
    return results | policy.restarts.metrics()


def seconds(function, *args):
    """How long a call takes, to the millisecond."""
    start = time.monotonic()
    function(*args)
    return round(time.monotonic() - start, 3)


def config_of(folder, arguments):
    """Supervised training that takes a snapshot after each update."""
    return SftConfig.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 100,
            "device": arguments.device,
            "data": {"dataset": ["unused"], "max_length": arguments.tokens},
            "model": {"path": folder},
            "policy": {
                "world_size": arguments.ranks,
                "global_batch_size": arguments.rows,
                "snapshot_steps": 1,
            },
        }
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--idle", type=float, default=3.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
