"""A run whose files are written as a run writes them, with completions of a random mouth."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from config_cases import write_model
from data_cases import chat_tokenizer, write_jsonl

from rlsys.algo.advantages import advantages_of_group, compute_advantages
from rlsys.algo.batching import build_train_batch
from rlsys.algo.rollout_metrics import rollout_metrics
from rlsys.algo.weighting import leave_out
from rlsys.config import Config
from rlsys.config.load import save_config
from rlsys.data.load import load_prompts
from rlsys.plugins.load import load_plugins, loaded_files
from rlsys.rewards.scoring import Reward, weighted_total
from rlsys.rollout.evaluation import metrics_of_sets
from rlsys.run.folder import RunDir
from rlsys.run.inputs import record_inputs
from rlsys.run.manifest import write_manifest
from rlsys.tracking import build_tracker
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup

STEPS, G = 4, 4
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"


def write_verified_run(folder: Path, *, steps: int = STEPS, **sections: Any) -> RunDir:
    """A finished run below `folder`, with its data and its model."""
    config = _config(folder, steps, **sections)
    load_plugins(config.plugins)
    run = RunDir(Path(config.output_dir))
    source = random.Random(0)
    tokenizer = chat_tokenizer(TEMPLATE)
    data = load_prompts(config.data, tokenizer, seed=config.seed)
    run.path.mkdir(parents=True)
    save_config(config, run.config)
    record_inputs(config, run, None, loaded_files())
    rewards = [Reward(name, config.reward.params.get(name)) for name in config.reward.names]
    tracker = build_tracker(config)

    def evaluate(step: int) -> None:
        groups = [
            replace(_group(config, source, rewards, prompt, step, size=1), group_id=number)
            for number, prompt in enumerate(data.validation)
        ]
        for group in groups:
            tracker.log_completions(step, group, None, "eval")
        tracker.log_metrics(step, metrics_of_sets(config, {"": groups}))

    evaluate(0)
    for step in range(1, steps + 1):
        prompts = source.sample(data.train, config.num_prompts)
        groups = [
            replace(_group(config, source, rewards, prompt, step - 1), group_id=number)
            for number, prompt in enumerate(prompts)
        ]
        for group in source.sample(groups, len(groups)):  # as they are finished
            weights = config.reward.reward_weights
            tracker.log_completions(step, group, advantages_of_group(group, config.grpo, weights))
        tracker.log_metrics(step, _metrics(config, groups, step))
        if step % 2 == 0:
            evaluate(step)
    checkpoint = run.checkpoints / f"step-{steps}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("weights")
    write_manifest(checkpoint, steps, {})
    tracker.close()
    run.record_end(0, "done")
    return run


def _config(folder: Path, steps: int, **sections: Any) -> Config:
    write_model(folder / "model")
    chat_tokenizer(TEMPLATE).save_pretrained(folder / "model")
    for split, first, size in (("train", 1, 12), ("validation", 13, 3)):
        rows = [
            {"prompt": f"Make {n + 3} of 1, 2 and {n}.", "nums": [1, 2, n], "target": n + 3}
            for n in range(first, first + size)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "eval_steps": 2,
        "data": {
            "dataset": [str(folder / "train.jsonl")],
            "val_dataset": [str(folder / "validation.jsonl")],
        },
        "model": {"path": str(folder / "model")},
        "rollout": {
            "generation_batch_size": 2 * G,
            "num_generations": G,
            "max_completion_length": 64,
        },
        "reward": {"reward_funcs": ["countdown", "format"], "reward_weights": [1.0, 0.3]},
        "tracking": {"report_to": []},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return Config.model_validate(values)


def _group(
    config: Config,
    source: random.Random,
    rewards: list[Reward],
    prompt: Prompt,
    version: int,
    size: int = G,
) -> RolloutGroup:
    n = prompt.columns["target"] - 3
    texts = source.choices(
        [
            f"<think>hm</think>\n<answer>1 + 2 + {n}</answer>",
            f"<think>hm</think>\n<answer>{n} - 2</answer>",
            f"1 + 2 + {n}",
            "I do not know",
        ],
        k=size,
    )
    completions = [
        Completion(
            token_ids=list(range(len(text) % 64 + 1)),
            rollout_logprobs=[-0.5] * (len(text) % 64 + 1),
            text=text,
            finish_reason="length" if text[0] == "I" else "stop",
            policy_versions=(version,),
        )
        for text in texts
    ]
    group = RolloutGroup(ticket=0, prompt=prompt, completions=completions)
    values = [reward.score(group).values for reward in rewards]
    weights = config.reward.reward_weights or [1.0] * len(rewards)
    names = config.reward.names
    outputs = [
        RewardOutput(weighted_total(row, weights), dict(zip(names, row, strict=True)))
        for row in zip(*values, strict=True)
    ]
    return replace(group, rewards=outputs)


def _metrics(config: Config, groups: list[RolloutGroup], step: int) -> dict[str, float]:
    batch = build_train_batch(groups)
    weights = config.reward.reward_weights
    batch.advantages = compute_advantages(groups, batch, config.grpo, weights)
    leave_out(batch, groups, mask_truncated_completions=config.grpo.mask_truncated_completions)
    return rollout_metrics(groups, batch) | {
        "staleness/mean": 0.0,
        "staleness/max": 0.0,
        "policy_version": step,
        "grad_norm": 0.5,
        "time/step": 1.0,
    }


def edit_line(path: Path, number: int, change: Any) -> None:
    """Change the object on a line, counted from 1; a change that returns None drops it."""
    lines = path.read_text().splitlines()
    row = json.loads(lines[number - 1])
    changed = change(row)
    lines[number - 1 : number] = [] if changed is None else [json.dumps(changed)]
    path.write_text("".join(line + "\n" for line in lines))
