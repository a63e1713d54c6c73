"""Times a weight sync on CPU, next to the least it could take. Prints JSON.

    python benchmarks/weight_sync_cpu.py                           # a model of the demo's shape
    python benchmarks/weight_sync_cpu.py --shape smollm2-135m
    python benchmarks/weight_sync_cpu.py --shape smollm2-135m --adapter-rank 16

A policy of one rank sends the weights of a random model to a rollout engine. Then as many bytes
are copied within one process, and broadcast over gloo between two processes that do nothing else.
With --adapter-rank the engine gets the base once, and every timed sync brings a LoRA adapter alone.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch
from random_model import SHAPES, save_random_model

from rlsys.actors.policy import PolicyActors
from rlsys.actors.ray_session import ray_session
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import get_all
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import Config
from rlsys.weight_sync.connection import Connection
from rlsys.weight_sync.transport import LOOPBACK, make_transport, serve_store

CPU = torch.device("cpu")
TIMEOUT_S = 300.0


class Process:
    """A process that moves as many bytes as a weight sync, and does nothing else."""

    def connect_plain(self, port, rank):
        self.plain = make_transport("gloo", CPU)
        connection = Connection((), 0, "gloo", LOOPBACK, port, 2, 0, False, False, TIMEOUT_S)
        self.plain.connect(connection, rank)

    def broadcast(self, nbytes, repeats):
        buffer = torch.zeros(nbytes, dtype=torch.uint8)
        return [seconds(lambda: self.plain.broadcast(buffer, what="it")()) for _ in range(repeats)]

    def memcpy(self, nbytes, repeats):
        source, target = (
            torch.ones(nbytes, dtype=torch.uint8),
            torch.zeros(nbytes, dtype=torch.uint8),
        )
        return [seconds(lambda: target.copy_(source)) for _ in range(repeats)]


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main():
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder, ray_session(log_to_driver=False):
        save_random_model(Path(folder), arguments.shape, "cpu")
        print(json.dumps(measure(Path(folder), arguments), indent=2))


def measure(folder, arguments):
    rank = arguments.adapter_rank
    config = Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 1,
            "data": {"dataset": ["unused"], "max_prompt_length": 64},
            "model": {"path": str(folder), "dtype": "float32"},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {"generation_batch_size": 8, "max_completion_length": 64, "max_num_seqs": 8},
            "policy": {"lora": {"rank": rank, "alpha": rank} if rank else None},
            "weight_sync": {
                "lora": "adapter" if rank else "auto",
                "bucket_mb": arguments.bucket_mb,
                "verify": not arguments.no_verify,
                "timeout_s": TIMEOUT_S,
            },
        }
    )
    engines, policy = RolloutActors(config, device="cpu"), PolicyActors(config, device="cpu")
    starting = engines.async_start() | policy.async_start()
    get_all(starting, phase="start", timeout_s=TIMEOUT_S)
    publisher = WeightPublisher(
        policy, engines, config.weight_sync, adapter_scaling=1.0 if rank else None
    )
    publisher.publish()  # the first one also connects and allocates, and sends an adapter's base
    published = [publisher.publish() for _ in range(arguments.repeats)]
    nbytes = int(published[0]["weight_sync/bytes"])
    sync = statistics.median(metrics["weight_sync/seconds"] for metrics in published)
    engines.close()
    policy.close()
    actor_class = ray.remote(Process).options(num_cpus=0.01)
    first, second = actor_class.remote(), actor_class.remote()
    copies = ray.get(first.memcpy.remote(nbytes, 1 + arguments.repeats))
    memcpy = statistics.median(copies[1:])
    gloo = statistics.median(plain_broadcast(first, second, nbytes, arguments.repeats))
    return {
        "shape": arguments.shape,
        "adapter_rank": rank,
        "bucket_mb": arguments.bucket_mb,
        "megabytes": nbytes / 1e6,
        "verify": config.weight_sync.verify,
        "weight_sync_s": sync,
        "weight_sync_mb_per_s": nbytes / 1e6 / sync,
        "memcpy_s": memcpy,
        "gloo_broadcast_s": gloo,
        "weight_sync_over_memcpy": sync / memcpy,
        "weight_sync_over_gloo_broadcast": sync / gloo,
    }


def plain_broadcast(first, second, nbytes, repeats):
    store = serve_store(LOOPBACK, TIMEOUT_S)
    pair = {"sender": first, "receiver": second}

    def call(method, *arguments):
        refs = {
            name: getattr(actor, method).remote(*arguments, *extra)
            for (name, actor), extra in zip(pair.items(), extras, strict=True)
        }
        return get_all(refs, phase=method, timeout_s=TIMEOUT_S)

    extras = [(0,), (1,)]
    call("connect_plain", store.port)
    extras = [(), ()]
    _, received = call("broadcast", nbytes, 1 + repeats)
    return received[1:]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--adapter-rank", type=int, help="send an adapter of all linear layers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
