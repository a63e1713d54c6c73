"""A short supervised run that brings the starter model to the level where GRPO can work.

The same megatron-core policy, vLLM engine, weight sync and rewards as in GRPO; only the loss is
"sft", on solutions made with the problems. It stops when held-out problems are solved often
enough, by the reward and not by a step count, because the rise is steep.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from problems import generate_problems
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlsys.actors.ray_session import ray_session
from rlsys.config import Config
from rlsys.data import render_prompt
from rlsys.preflight.before_start import load_data
from rlsys.system import start_system
from rlsys.tracking import Tracker
from rlsys.types import TrainBatch

BATCH_SIZE = 32
NUM_ROWS = 12_000
MAX_STEPS = 500
CHECK_EVERY = 25
REWARD = "eval/rewards/countdown/mean"


class NoTracker(Tracker):
    """A warm start leaves nothing but its model."""

    def close(self) -> None:
        """Nothing to close."""


def warm_start(
    model: Path, data: Path, out: Path, *, stop_at: float, seed: int
) -> dict[str, float]:
    """Train `model` on solutions until held-out pass@1 reaches `stop_at`; save it to `out`.

    Returns:
        the held-out metrics of the saved model.

    Raises:
        RuntimeError: MAX_STEPS were not enough.
    """
    config = _config(model, data, seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = generate_problems(NUM_ROWS, seed=1000 + seed, unique=False)
    examples = [_tokenize(tokenizer, row) for row in rows]
    rng = random.Random(seed)
    with ray_session():
        system = start_system(config, load_data(config), NoTracker())
        for step in range(1, MAX_STEPS + 1):
            batch = _batch(rng.sample(examples, BATCH_SIZE))
            loss = system.policy.update(batch, loss="sft").metrics["loss"]
            if step % CHECK_EVERY:
                continue
            system.publisher.publish()
            metrics = system.rollouts.evaluate(step)
            print(
                f"  step {step:3d}  loss {loss:.3f}  held-out countdown {metrics[REWARD]:.3f}  "
                f"format {metrics['eval/rewards/format/mean']:.3f}",
                flush=True,
            )
            if metrics[REWARD] >= stop_at:
                system.policy.save_model(out)
                return metrics
    raise RuntimeError(f"held-out countdown stayed below {stop_at} for {MAX_STEPS} steps")


def _config(model: Path, data: Path, seed: int) -> Config:
    return Config.model_validate(
        {
            "output_dir": str(model.parent),
            "max_steps": MAX_STEPS,
            "seed": seed,
            "data": {
                "dataset": [str(data / "train.jsonl")],
                "val_dataset": [str(data / "validation.jsonl")],
                "max_prompt_length": 128,
            },
            "model": {"path": str(model)},
            "rollout": {
                "generation_batch_size": BATCH_SIZE,
                "max_completion_length": 40,
                "max_num_seqs": 256,
            },
            "reward": {"reward_funcs": ["countdown", "format"]},
            "grpo": {"loss_aggregation": "token_mean"},
            "policy": {
                "micro_batch_size": BATCH_SIZE,
                "lr": 3e-3,
                "min_lr": 3e-4,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.06,
                "weight_decay": 0.01,
                "adam_beta2": 0.98,
            },
        }
    )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the solution with its EOS token."""
    prompt = render_prompt(row["messages"], tokenizer)
    response = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
    return prompt, [*response, tokenizer.eos_token_id]


def _batch(examples: list[tuple[list[int], list[int]]]) -> TrainBatch:
    """Supervised examples in the form of a rollout: the "sft" loss reads tokens and mask only."""
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in examples])
    shape = (len(examples), int(lengths.max()))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(examples):
        tokens = prompt + response
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        completion_mask[row, len(prompt) : len(tokens)] = True
    return TrainBatch(
        input_ids=input_ids,
        lengths=lengths,
        completion_mask=completion_mask,
        advantages=torch.zeros(shape),
        rollout_logprobs=torch.zeros(shape),
    )
