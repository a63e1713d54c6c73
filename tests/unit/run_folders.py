"""Folders of runs to look at, made by the writers of real runs from numbers that are made up.

`python tests/unit/run_folders.py FOLDER` writes three runs below FOLDER, `--live` goes on with one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

from tracking_cases import make_config

from rlsys.config.load import save_config
from rlsys.files import JsonlWriter
from rlsys.run.folder import RUNNING, RunDir
from rlsys.timeline.spans import Span
from rlsys.tracking.jsonl import CompletionsTracker, JsonlTracker, TimelineTracker
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup

START = 1_790_000_000.0
"""Unix seconds of the first step."""
SECONDS_A_STEP = 10.0
PHASES = {"rollout": 0.6, "ref_logprobs": 0.08, "policy_update": 0.27, "weight_sync": 0.05}
"""Phase of the driver -> share of a step."""
ACTORS = {
    "rollout 0": ("rollout", ("rollout", "weight_sync")),
    "rollout 1": ("rollout", ("rollout", "weight_sync")),
    "reward 0": ("reward", ("rollout",)),
    "reference 0": ("reference", ("ref_logprobs",)),
    "policy 0": ("policy", ("policy_update", "weight_sync")),
    "policy 1": ("policy", ("policy_update", "weight_sync")),
}
"""Actor -> its role and the phases in which it works."""
HTML = "<script>alert('from a completion')</script><img src=x onerror=alert(1)>"
PROMPTS = 16
EVAL_STEPS = 10
SECTIONS = {
    "eval_steps": EVAL_STEPS,
    "data": {"dataset": ["train.jsonl"], "val_dataset": ["validation.jsonl"]},
    "rollout": {"generation_batch_size": 8, "num_generations": 4},
}
"""What the config of these runs says besides `make_config`."""


class RunWriter:
    """Writes one run step by step, as its driver does.

    Args:
        folder: output_dir.
        seed: of all numbers, so that runs differ.
        start: unix seconds of the first step.
        fields: of the config.
    """

    def __init__(self, folder: Path, *, seed: int = 0, start: float = START, **fields: Any):
        self.run = RunDir(folder)
        self.config = make_config(folder, **SECTIONS | fields)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.run.config)
        self.run.write_status(RUNNING)
        self._random = random.Random(seed)
        self._clock = start
        self._metrics = JsonlTracker(self.run.metrics)
        self._completions = CompletionsTracker(self.run)
        self._timeline = TimelineTracker(self.run.timeline)
        self._warnings = JsonlWriter(self.run.warnings)
        self.run.logs.mkdir(exist_ok=True)
        self.step = 0

    def steps(self, count: int) -> None:
        """Take this many steps."""
        for _ in range(count):
            self.take_step()

    def take_step(self) -> None:
        """Write what one step leaves in every file."""
        self.step += 1
        groups = [self._group(index) for index in range(2)]
        for group in groups:
            rewards = [reward.total for reward in group.rewards]
            mean = sum(rewards) / len(rewards)
            self._completions.log_completions(self.step, group, [r - mean for r in rewards])
        self._metrics.log_metrics(self.step, self._numbers(groups))
        if self.step % EVAL_STEPS == 0:
            held_out = self._group(0, "held-out")
            self._completions.log_completions(self.step, held_out, None, "eval")
            reward = sum(r.total for r in held_out.rewards) / len(held_out.rewards)
            self._metrics.log_metrics(self.step, {"eval/reward": reward, "eval/kl": 0.01})
        self._write_timeline()
        if self.step == 5:
            self._warnings.append(
                {
                    "time": self._clock,
                    "step": self.step,
                    "warning": "entropy_collapse",
                    "metric": "entropy",
                    "value": 0.04,
                    "threshold": 0.1,
                    "message": "entropy fell to 0.04, below 0.1",
                    "look_at": "completions of the newest steps: are they all alike?",
                }
            )
        self._write_actors()

    def end(self) -> None:
        """Close the files and say that the run has ended."""
        for part in (self._metrics, self._completions, self._timeline, self._warnings):
            part.close()
        self.run.record_end(0, "done")

    def _group(self, index: int, split: str = "countdown") -> RolloutGroup:
        prompt_number = (2 * self.step + index) % PROMPTS
        numbers = [3 + prompt_number, 5, 7, 2]
        skill = 1 - math.exp(-self.step / 20)
        completions, rewards = [], []
        for place in range(self.config.rollout.num_generations):
            right = self._random.random() < skill
            text = (
                f"<think>\nTry {numbers[0]} * 5 = {numbers[0] * 5}. Größe 数字 🧮\n</think>\n"
                f"<answer>{numbers[0]} * 5 + 7 - 2</answer>"
            )
            text = HTML if (self.step, index, place) == (1, 0, 0) else text + "!" * place
            completions.append(
                Completion(
                    token_ids=[100 + ord(letter) % 50 for letter in text],
                    rollout_logprobs=[-self._random.random() for _ in text],
                    text=text,
                    finish_reason="stop" if right else "length",
                    policy_versions=(self.step - 1,),
                )
            )
            by_name = {"countdown": float(right), "format": float(self._random.random() < 0.8)}
            rewards.append(RewardOutput(sum(by_name.values()), by_name))
        return RolloutGroup(
            ticket=index,
            group_id=2 * self.step + index,
            prompt=Prompt(
                prompt_id=f"{split}-{prompt_number}",
                messages=[
                    {"role": "user", "content": f"Make {numbers[0] * 5 + 5} from {numbers}."}
                ],
                token_ids=[1, 2],
            ),
            completions=completions,
            rewards=rewards,
        )

    def _numbers(self, groups: list[RolloutGroup]) -> dict[str, float]:
        noise = self._random.gauss
        rewards = [reward.total for group in groups for reward in group.rewards]
        lengths = [len(c.token_ids) for group in groups for c in group.completions]
        progress = 1 - math.exp(-self.step / 20)
        return {
            "reward": sum(rewards) / len(rewards),
            "reward_std": abs(noise(0.3, 0.05)),
            "loss": noise(0, 0.001),
            # one spike that a chart must not lose
            "grad_norm": 40.0 if self.step == 7 else abs(noise(0.7, 0.1)),
            "learning_rate": 5e-7,
            "entropy": 1.2 * math.exp(-self.step / 60) + noise(0, 0.02),
            "kl": 0.02 * progress + abs(noise(0, 0.001)),
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/clipped_ratio": 0.3 * (1 - progress),
            "sampling/logp_difference/mean": abs(noise(0.002, 0.0002)),
            # NaN becomes null in the file
            "sampling/kl": math.nan if self.step == 3 else abs(noise(0.0002, 0.00002)),
            "rollout/tokens_per_second": noise(1200, 40),
            **{f"time/{p}": SECONDS_A_STEP * share for p, share in PHASES.items()},
            "time/step": SECONDS_A_STEP,
            "policy_version": self.step,
        }

    def _write_timeline(self) -> None:
        spans, start = [], self._clock
        for phase, share in PHASES.items():
            end = start + SECONDS_A_STEP * share
            spans.append(Span("driver", "driver", phase, start, end, self.step))
            spans += [
                Span(actor, role, phase, start, end, self.step)
                for actor, (role, works_in) in ACTORS.items()
                if phase in works_in
            ]
            start = end
        self._timeline.log_timeline(spans)
        self._clock += SECONDS_A_STEP

    def _write_actors(self) -> None:
        rows = []
        for actor, role in [("driver", "driver"), *((a, role) for a, (role, _) in ACTORS.items())]:
            rank = int(actor.rpartition(" ")[2]) if " " in actor else 0
            with (self.run.logs / f"{role}-{rank}.log").open("a") as log:
                log.write(f"step {self.step} is done\n")
            has_gpu = role not in ("driver", "reward")
            rows.append(
                {
                    "role": role,
                    "rank": rank,
                    "name": actor,
                    "pid": 4000 + len(rows),
                    "node": "node-a",
                    "gpu": rank if has_gpu else None,
                    "memory_gib": 3.5,
                    "gpu_memory_gib": 61.2 if has_gpu else None,
                    "restarts": int(actor == "rollout 1"),
                    "started": START,
                    "last_heartbeat": self._clock,
                    "alive": True,
                }
            )
        self.run.actors.write_text(json.dumps(rows))


def write_run_folder(folder: Path, steps: int = 30, **fields: Any) -> RunDir:
    """A run that has ended after `steps` steps."""
    writer = RunWriter(folder, **fields)
    writer.steps(steps)
    writer.end()
    return writer.run


def main() -> None:
    """Write three runs; the third goes on with --live."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--live", action="store_true", help="one more step every second")
    args = parser.parse_args()
    write_run_folder(args.folder / "seed-0", args.steps, seed=0)
    write_run_folder(args.folder / "seed-1", args.steps, seed=1, policy={"lr": 2e-6})
    writer = RunWriter(args.folder / "live", seed=2, start=time.time())
    with writer.run.held():
        writer.steps(args.steps)
        while args.live:
            time.sleep(1)
            writer.take_step()


if __name__ == "__main__":
    main()
