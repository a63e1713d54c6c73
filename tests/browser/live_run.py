"""A run that goes on: writes what a run writes, with the trackers of a run, until it is stopped.

    python live_run.py FOLDER STEPS SECONDS_A_STEP SEED

With 0 seconds a step it writes all steps and ends.
"""

import itertools
import random
import sys
import time
from pathlib import Path

from rlsys.files import JsonlWriter
from rlsys.run.folder import RUNNING, RunDir
from rlsys.tracking.jsonl import CompletionsTracker, JsonlTracker
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup

HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
"""What a page must show as text."""
CONFIG = "seed: {seed}\ngrpo:\n  num_generations: 4\npolicy:\n  learning_rate: 1.0e-06\n"


def metrics(step: int, seed: int) -> dict[str, float]:
    """Metrics of a step that gets better."""
    noise = random.Random(1000 * seed + step).gauss(0, 0.05)
    done = step / (step + 30)
    return {
        "reward": done + noise,
        "completions/mean_length": 40 + 20 * done,
        "kl": 0.01 * done,
        "sampling/logp_difference/mean": 0.02 + noise / 100,
        "entropy": 1.4 - done,
        "time/step": 2.0 + noise,
        "rollout/tokens_per_second": 1000 + 100 * noise,
        "rewards/countdown/mean": done,
        "rewards/format/mean": 1.0,
    }


def group(step: int, group_id: int) -> RolloutGroup:
    """Four completions of a problem that comes again every fifth step."""
    problem = (2 * step + group_id) % 10
    messages = [{"role": "user", "content": f"Make {problem} from [3, {problem}, 3]. {HOSTILE}"}]
    texts = [
        f"<think>3 - 3 + {problem}</think><answer>3 - 3 + {problem}</answer>",
        f"<think>let me see <tool_call>sum(3, {problem})</tool_call></think>",
        f"I give up {HOSTILE}",
        "<think>" + "and so on, " * 200,
    ]
    return RolloutGroup(
        ticket=10 * step + group_id,
        prompt=Prompt(f"train:{problem}", messages, [1, 2, 3]),
        completions=[
            Completion([5] * n, [-0.5] * n, text, "length" if "and so" in text else "stop", (step,))
            for n, text in zip((20, 25, 10, 400), texts, strict=True)
        ],
        rewards=[
            RewardOutput(2.0 * (i == 0), {"countdown": float(i == 0), "format": float(i < 2)})
            for i in range(len(texts))
        ],
        group_id=group_id,
    )


def main(folder: Path, steps: int, seconds: float, seed: int) -> None:
    """Write steps until SIGTERM, or all of them at once."""
    run = RunDir(folder)
    with run.held():
        run.config.write_text(CONFIG.format(seed=seed))
        run.write_status(RUNNING)
        run.logs.mkdir(exist_ok=True)
        log = (run.logs / "policy-0.log").open("a")
        spans = JsonlWriter(folder / "timeline.jsonl")
        trackers = (JsonlTracker(run.metrics), CompletionsTracker(run))
        for step in itertools.count(1) if seconds else range(1, steps + 1):
            start = time.time()
            for group_id in range(2):
                for tracker in trackers:
                    tracker.log_completions(step, group(step, group_id), [1.5, -0.5, -0.5, -0.5])
            for actor, role, phase, first, last in (
                ("driver", "driver", "rollout", 0, 0.6),
                ("driver", "driver", "policy_update", 0.6, 1),
                ("rollout engine 0", "rollout", "sampling", 0, 0.6),
                ("policy rank 0", "policy", "update", 0.6, 1),
            ):
                place = start if seconds else start + 2 * (step - steps)
                times = {"start": place + first, "end": place + last}
                spans.append({"actor": actor, "role": role, "phase": phase, **times, "step": step})
            print(f"step {step} {HOSTILE}", file=log, flush=True)
            for tracker in trackers:
                tracker.log_metrics(step, metrics(step, seed))
                if step % 10 == 0:
                    tracker.log_metrics(step, {"eval/reward": step / (step + 30)})
            time.sleep(seconds)
        run.mark_ended()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
