"""Measures what a step waits for a checkpoint, and how long the disk takes. Prints JSON.

    python benchmarks/checkpoints.py                          # SmolLM2-135M's shape on CPU
    python benchmarks/checkpoints.py --device cuda --shape qwen2.5-1.5b
    python benchmarks/checkpoints.py --folder /mnt/slow       # another disk

One policy rank, without Ray: one update, then checkpoints of it with checkpoint.async_save and
without, in turns. The wait is `begin_checkpoint`; on the disk is when all files are flushed and
summed.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from machine import describe_machine
from random_model import SHAPES, save_random_model

from rlsys.config import SftConfig
from rlsys.files import bytes_in
from rlsys.types import TrainBatch

ROWS, TOKENS = 4, 32


def main():
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        save_random_model(folder / "model", arguments.shape, arguments.device)
        policy = build_policy(folder / "model", arguments.device)
        policy.update(random_batch(SHAPES[arguments.shape].vocabulary), loss="sft")
        results = [
            measure(policy, folder / "checkpoint", in_background)
            for _ in range(arguments.repeats)
            for in_background in (True, False)
        ]
    print(json.dumps({"machine": describe_machine(), "checkpoints": results}, indent=2))


def build_policy(model, device):
    """A policy of one rank in this process."""
    if device == "cpu":
        from rlsys.engines.megatron.on_cpu import enable_megatron_on_cpu

        enable_megatron_on_cpu()
    from rlsys.engines.megatron.parallel import ParallelLayout, initialize_parallel
    from rlsys.engines.megatron.policy import MegatronPolicy

    layout = ParallelLayout(rank=0, world_size=1, timeout_s=600)
    initialize_parallel(layout, dist.HashStore(), device=device, seed=0)
    config = SftConfig.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 100,
            "data": {"dataset": ["unused"], "max_length": TOKENS},
            "model": {"path": str(model)},
            "policy": {"global_batch_size": ROWS},
        }
    )
    return MegatronPolicy(config, device=device)


def random_batch(vocabulary):
    shape = (ROWS, TOKENS)
    return TrainBatch(
        input_ids=torch.randint(10, vocabulary, shape),
        lengths=torch.full(shape[:1], TOKENS),
        completion_mask=torch.ones(shape, dtype=torch.bool),
        advantages=torch.zeros(shape),
        rollout_logprobs=torch.zeros(shape),
    )


def measure(policy, folder, in_background):
    """Seconds of one checkpoint, and its size; the folder is gone afterwards."""
    checkpoint = policy.config.checkpoint.model_copy(update={"async_save": in_background})
    policy.config = policy.config.model_copy(update={"checkpoint": checkpoint})
    folder.mkdir()
    start = time.monotonic()
    policy.begin_checkpoint(folder)
    wait = time.monotonic() - start
    while policy.writer.sums(folder) is None:
        time.sleep(0.01)
    result = {
        "async_save": in_background,
        "wait_s": round(wait, 2),
        "on_disk_s": round(time.monotonic() - start, 2),
        "gib": round(bytes_in(folder) / 2**30, 2),
    }
    shutil.rmtree(folder)
    return result


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--folder", help="on the disk that is measured")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
