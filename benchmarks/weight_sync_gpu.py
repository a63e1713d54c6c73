"""Weight sync between two GPUs, policy to rollout engine, copies in place against vLLM's loader.

    python benchmarks/weight_sync_gpu.py                     # Qwen2.5-1.5B's shape, 3.09 GB in bf16
    python benchmarks/weight_sync_gpu.py --device cpu --shape tiny        # does the script work?

A real policy and a real engine, with random weights of the shape. Every sync is the whole of it:
pause, export from megatron-core's layout, transport, loading, prefix cache, resume. The syncs in
place are also a stress test: the weights change before each of them, every bucket's checksums are
compared, and at the end those of every parameter. Prints JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import ray
import torch
from machine import describe_machine
from random_model import SHAPES, save_random_model

from rlsys.actors.group import get_all
from rlsys.actors.policy import PolicyActors, PolicyRank
from rlsys.actors.rollout import RolloutActor, RolloutActors
from rlsys.algo.batching import build_train_batch
from rlsys.config import Config
from rlsys.types import Prompt, SampleRequest
from rlsys.weight_sync.checksum import as_numbers, checksum
from rlsys.weight_sync.publisher import WeightPublisher

TIMEOUT_S = 300.0


class ChangingRank(PolicyRank):
    """A policy whose weights can be changed without training."""

    @torch.no_grad()
    def change_weights(self):
        for parameter in self.engine.model.parameters():
            parameter.mul_(-1.0)

    def send_weights(self, to):
        start = time.perf_counter()
        sent = super().send_weights(to)
        self.send_seconds = time.perf_counter() - start
        return sent

    def seconds_of_send(self):
        return self.send_seconds

    def exported_checksums(self):
        tensors = dict(self.engine.weights.export())
        content = [t.contiguous().view(-1).view(torch.uint8) for t in tensors.values()]
        return dict(zip(tensors, as_numbers([checksum(data) for data in content]), strict=True))


class OpenActor(RolloutActor):
    """A rollout actor that tells what its parameters hold, and how long they took."""

    async def update_weights(self):
        start = time.perf_counter()
        received = await super().update_weights()
        self.receive_seconds = time.perf_counter() - start
        return received

    async def seconds_of_receive(self):
        return self.receive_seconds

    async def ask_workers(self, method):
        return await self._call("ask_workers", method)


def main():
    arguments = parse_arguments()
    ray.init(include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        device = arguments.device
        save = ray.remote(num_gpus=0 if device == "cpu" else 1, max_calls=1)(save_random_model)
        ray.get(save.remote(Path(folder), arguments.shape, device))
        print(json.dumps(measure(Path(folder), arguments), indent=2))
    ray.shutdown()


def measure(folder, arguments):
    config = make_config(folder)
    gpus = {"num_gpus": 0 if arguments.device == "cpu" else 1, "num_cpus": 0.01}
    from rlsys.actors import rollout

    rollout.RolloutActor = OpenActor
    engines = RolloutActors(config, device=arguments.device, place=lambda rank: gpus)
    policy = PolicyActors(config, place=lambda rank: gpus, rank_class=ChangingRank)
    starting = engines.async_start() | policy.async_start()
    get_all(starting, phase="start", timeout_s=TIMEOUT_S)
    results = {"machine": describe_machine(), "shape": arguments.shape}
    usual = config.weight_sync
    for name, repeats, settings in (
        ("vllm_loader", 5, {"in_place": False}),
        ("in_place_without_checksums", 20, {"verify": False}),
        ("in_place_buckets_of_64_mb", 20, {"bucket_mb": 64}),
        ("in_place_buckets_of_1024_mb", 20, {"bucket_mb": 1024}),
        ("in_place", arguments.repeats, {}),
    ):
        section = usual.model_copy(update=settings)
        results[name] = syncs(policy, engines, section, repeats)
    results["in_place_over_vllm_loader"] = (
        results["in_place"]["median_s"] / results["vllm_loader"]["median_s"]
    )
    (actor,) = engines.actors.values()
    results["in_place"]["used"] = ray.get(actor.ask_workers.remote("loads_in_place"))
    if all(results["in_place"]["used"]):
        held = dict(ray.get(actor.ask_workers.remote("loaded_checksums"))[0])
        results["parameters_equal_after_all"] = held == policy.call("exported_checksums")[0]
    results["mean_logp_difference"] = logp_difference(policy, engines, config)
    return results


def syncs(policy, engines, section, repeats):
    publisher = WeightPublisher(policy, engines, section)
    publisher.publish()  # connects, compiles, and proves the plan
    (actor,) = engines.actors.values()
    seconds, sends, receives = [], [], []
    for _ in range(repeats):
        policy.call("change_weights")
        policy.policy_version += 1
        metrics = publisher.publish()
        seconds.append(metrics["weight_sync/seconds"])
        sends.append(policy.call("seconds_of_send")[0])
        receives.append(ray.get(actor.seconds_of_receive.remote()))
    gigabytes = metrics["weight_sync/bytes"] / 1e9
    return {
        "syncs": repeats,
        "gigabytes": gigabytes,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "gb_per_s": gigabytes / statistics.median(seconds),
        "median_s_of_sending": statistics.median(sends),
        "median_s_of_receiving": statistics.median(receives),
    }


def logp_difference(policy, engines, config):
    """Mean |log-prob| difference of completions sampled with the synced weights, in nats."""
    prompts = [Prompt(str(i), [], [2 + i, 5, 7 + i], {}) for i in range(config.num_prompts)]
    each = config.rollout.num_generations
    engines.submit([SampleRequest(i, p, each, 1.0, seed=i) for i, p in enumerate(prompts)])
    groups = []
    while len(groups) < len(prompts):
        ray.wait(engines.pending_refs(), timeout=60)
        groups += engines.collect()
    batch = build_train_batch(groups)
    difference = policy.compute_logprobs(batch) - batch.rollout_logprobs
    return difference[batch.completion_mask].abs().mean().item()


def make_config(folder):
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 1000,
            "data": {"dataset": ["unused"], "max_prompt_length": 64},
            "model": {"path": str(folder)},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {
                "generation_batch_size": 64,
                "max_completion_length": 64,
                "max_num_seqs": 64,
                "kv_cache_memory_mb": 1024,
            },
            "weight_sync": {"timeout_s": TIMEOUT_S},
        }
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repeats", type=int, default=200, help="syncs in place")
    return parser.parse_args()


if __name__ == "__main__":
    main()
