"""What the longest completions cost, and what oversampling and staleness buy. Prints JSON.

    python benchmarks/long_tail.py                       # simulated, with the times of one H200
    python benchmarks/long_tail.py --validate            # besides, the same on vLLM here, on CPU

rlsys's own Rollouts decides what is sampled, given up and trained on (simulated_rollouts.py). Its
engines only count: lengths are lognormal, `--tail` times as long at the 999th of 1,000 completions
as at the median, and a decode step takes the seconds that were measured for as many sequences.
Prompts are read in no time, and a weight sync takes none.

Columns: seconds of a step; trained completion tokens a second; how long engines and policy idle, as
shares of a step (idle/rollout_frac and idle/policy_frac of a run); the sequences that run, on
average over the whole step; the mean length of trained completions next to that of
all that the model would write; and groups given up in a step.

--validate starts a small model on vLLM's CPU engine, measures its decode steps, and runs the same
steps once for real and once simulated, with an update of as many seconds as a rollout.
"""

import argparse
import contextlib
import json
import math
import random
import statistics
import sys

from machine import describe_machine
from simulated_rollouts import LengthEngine, World, run_steps

from rlsys.config import Config

STEP_MS = {128: 3.48, 512: 9.55, 1024: 16.68}
"""Sequences -> milliseconds of a decode step of a 1.5B model on an H200: 36.8k, 53.6k and 61.4k
tokens a second (RESULTS.md, Rollout). Between them, and below, times are on straight lines."""
UPDATE_TOKENS_PER_S = 56_500
"""Rate of the same model's update on one H200 (RESULTS.md, Policy update)."""
Z_999 = 3.09
"""Standard deviations from the median to the 999th of 1,000."""
WARM_UP = COOL_DOWN = 6
"""Steps that are not measured: engines fill, and at the end nothing more is begun."""
SETTINGS = {
    "max_staleness 0": {},
    "0, max_completion_length 4 x median": {"max_completion_length": 4},
    "0, oversample P/4": {"oversample_prompts": 0.25},
    "0, oversample P/2": {"oversample_prompts": 0.5},
    "0, oversample P": {"oversample_prompts": 1.0},
    "max_staleness 1, oversample P/2": {"max_staleness": 1, "oversample_prompts": 0.5},
    "max_staleness 1": {"max_staleness": 1},
    "max_staleness 2": {"max_staleness": 2},
    "max_staleness 4": {"max_staleness": 4},
}
"""oversample_prompts in P, max_completion_length in medians."""


def main():
    machine = describe_machine()
    arguments = parse_arguments()
    result = {"machine": machine, "settings": vars(arguments), "shapes": {}}
    for prompts in arguments.prompts:
        for tail in arguments.tail:
            name = f"{prompts} x {arguments.num_generations}, tail {tail:g}"
            result["shapes"][name] = table(arguments, prompts, tail)
            print(as_text(name, result["shapes"][name]), file=sys.stderr)
    if arguments.validate:
        from long_tail_real import validate

        with contextlib.redirect_stdout(sys.stderr):
            result["validation"] = validate(arguments)
    print(json.dumps(result, indent=2))


def table(arguments, prompts, tail):
    whole = Lengths(arguments.median, tail, arguments.longest, arguments.within).mean
    rows = {}
    for name, setting in SETTINGS.items():
        config = make_config(arguments, prompts, setting)
        longest = config.rollout.max_completion_length
        lengths = Lengths(arguments.median, tail, longest, arguments.within)
        steps = simulate(
            config, lengths, step_seconds, lambda n: n / UPDATE_TOKENS_PER_S / arguments.engines
        )
        rows[name] = summary(steps, whole)
    return rows


def simulate(config, lengths, step_seconds, update_seconds):
    """The rows of `run_steps` with engines that count tokens."""
    rollout = config.rollout
    world = World(
        lambda: LengthEngine(lengths, step_seconds, rollout.max_num_seqs), rollout.num_engines
    )
    return run_steps(config, world, update_seconds)


def summary(steps, mean_length):
    measured = steps[WARM_UP:-COOL_DOWN]
    seconds = sum(step["seconds"] for step in measured)
    trained = [number for step in measured for number in step["lengths"]]
    return {
        "step_s": seconds / len(measured),
        "tokens_per_s": sum(trained) / seconds,
        "rollout_idle": statistics.fmean(step["idle/rollout_frac"] for step in measured),
        "policy_idle": statistics.fmean(step["idle/policy_frac"] for step in measured),
        "running": sum(step["sequence_seconds"] for step in measured) / seconds,
        "trained_length": statistics.fmean(trained) / mean_length,
        "staleness": statistics.fmean(step["staleness/mean"] for step in measured),
        "given_up": statistics.fmean(step.get("rollout/groups_cut_off", 0.0) for step in measured),
    }


class Lengths:
    """Tokens of completions: lognormal, the same for the same prompt, attempt and seed.

    Args:
        median, longest: tokens; longer ones are cut.
        tail: tokens of the 999th of 1,000 completions, in medians.
        within: share of the variance of log lengths within a group; the rest is of the prompt.
    """

    def __init__(self, median, tail, longest, within):
        self._median, self._longest = median, longest
        deviation = math.log(tail) / Z_999
        self._within = deviation * math.sqrt(within)
        self._between = deviation * math.sqrt(1 - within)
        self.mean = statistics.fmean(
            number for i in range(4000) for number in self(f"mean {i}", 0, 8)
        )
        """Tokens of a completion, if all were trained on."""

    def __call__(self, name, attempt, number):
        of_prompt = random.Random(f"prompt {name}").gauss(0.0, self._between)
        draw = random.Random(f"completions {name} {attempt}")
        return [self._tokens(of_prompt + draw.gauss(0.0, self._within)) for _ in range(number)]

    def _tokens(self, log):
        return min(self._longest, max(1, round(self._median * math.exp(log))))


def step_seconds(running):
    """Seconds of a decode step, by STEP_MS."""
    return on_lines(STEP_MS, running) / 1e3


def on_lines(points, x):
    """The value at x of the straight lines through points {x: value}; the outer ones go on."""
    places = sorted(points)
    upper = next((i for i, place in enumerate(places) if place >= x), len(places) - 1)
    low, high = places[max(upper, 1) - 1], places[max(upper, 1)]
    slope = (points[high] - points[low]) / (high - low)
    return points[low] + slope * (x - low)


def make_config(arguments, prompts, setting):
    setting = {"max_completion_length": arguments.longest} | setting
    if "oversample_prompts" in setting:
        setting["oversample_prompts"] = round(setting["oversample_prompts"] * prompts)
    if setting["max_completion_length"] < 100:
        setting["max_completion_length"] *= arguments.median
    ahead = setting.get("oversample_prompts", setting.get("max_staleness", 0) * prompts)
    at_once = -(-(prompts + ahead) * arguments.num_generations // arguments.engines)
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": WARM_UP + arguments.steps + COOL_DOWN,
            "data": {"dataset": ["unused"], "max_prompt_length": 16},
            "model": {"path": "unused"},
            "reward": {"reward_funcs": ["format"]},
            "rollout": {
                "num_engines": arguments.engines,
                "generation_batch_size": prompts * arguments.num_generations,
                "num_generations": arguments.num_generations,
                "max_num_seqs": min(arguments.max_num_seqs, at_once),
                "timeout_s": 1e6,
                **setting,
            },
        }
    )


COLUMNS = {
    "step_s": ("s a step", "{:.1f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "rollout_idle": ("engines idle", "{:.0%}"),
    "policy_idle": ("policy idle", "{:.0%}"),
    "running": ("sequences running", "{:.0f}"),
    "trained_length": ("trained length", "{:.0%}"),
    "staleness": ("staleness", "{:.2f}"),
    "given_up": ("given up", "{:.1f}"),
}


def as_text(name, rows):
    """A Markdown table, for docs."""
    lines = [
        f"| {name} | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for setting, row in rows.items():
        cells = [form.format(row[key]) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 128], help="P of a step")
    parser.add_argument("--num_generations", type=int, default=8, help="G")
    parser.add_argument("--tail", type=float, nargs="+", default=[3.0, 10.0])
    parser.add_argument("--median", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--longest", type=int, default=8192, help="max_completion_length")
    parser.add_argument("--within", type=float, default=0.5, help="variance within groups")
    parser.add_argument("--engines", type=int, default=1, help="and GPUs of the policy")
    parser.add_argument("--max_num_seqs", type=int, default=1024, help="of an engine, at most")
    parser.add_argument("--steps", type=int, default=40, help="that are measured")
    parser.add_argument("--validate", action="store_true", help="on vLLM, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
