"""Times whole GRPO steps on GPUs, by phase, synchronous and running ahead. Prints JSON.

    python benchmarks/grpo_step.py                                   # Countdown's shape, 2 GPUs
    python benchmarks/grpo_step.py --prompts 32 --steps 2            # a quarter of it
    python benchmarks/grpo_step.py --gpus 1 --prompts 32             # policy and engine take turns
    python benchmarks/grpo_step.py --device cpu --shape tiny --prompts 8 --completion_length 32

Each value of `--staleness` is a run in a process of its own, with the code of `rlsys grpo`: config
file, data, Ray, actors, driver, rewards. The weights are random and never
sample EOS (random_model.py), so every completion has `--completion_length` tokens. The policy has
one GPU, and an engine has each other GPU. With `--gpus 1` both take turns, and a step is compared
with its phases alone. Any further option is one of `rlsys grpo`.

Idle shares come twice: for policy and rollout as the driver sees them wait for each other
(idle/policy_frac and idle/rollout_frac in docs/metrics.md), and for each GPU as nvidia-smi samples
whether a kernel was running.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from alone import results_only, run_alone
from grpo_run import run_steps, write_config
from machine import describe_machine
from random_model import SHAPES, save_random_model


def main():
    arguments, options = parse_arguments()
    if arguments.one is not None:
        with results_only() as tell:
            tell(one(arguments, options, tell))
        return
    line = [sys.executable, __file__, *sys.argv[1:]]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        line += ["--model", str(Path(folder) / "model"), "--one"]
        gpus = list(range(arguments.gpus)) if arguments.device == "cuda" else None
        saved = run_alone([*line, "save"], timeout_s=arguments.timeout_s, gpus=gpus)
        if "error" in saved:
            sys.exit(f"no model to measure with: {saved['error']}")
        for staleness in arguments.staleness:
            results[f"max_staleness {staleness}"] = run_alone(
                [*line, str(staleness)], timeout_s=arguments.timeout_s, gpus=gpus
            )
            print(json.dumps(results), file=sys.stderr, flush=True)
    names = ("shape", "prompts", "generations", "completion_length", "gpus")
    asked = {name: getattr(arguments, name) for name in names} | {"options": options}
    print(json.dumps({"machine": describe_machine(), **asked, **results}, indent=2))


def one(arguments, options, tell):
    if arguments.one == "save":
        save_random_model(arguments.model, arguments.shape, arguments.device, endless=True)
        return {"saved": str(arguments.model)}
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(
            Path(folder),
            model=arguments.model,
            device=arguments.device,
            steps=arguments.warm_up + arguments.steps,
            prompts=arguments.prompts,
            generations=arguments.generations,
            completion_length=arguments.completion_length,
            gpus=arguments.gpus,
        )
        options = [*options, "--rollout.max_staleness", arguments.one]
        alone = arguments.gpus == 1
        return run_steps(config, options, warm_up=arguments.warm_up, report=tell, alone=alone)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompts", type=int, default=128, help="of a step")
    parser.add_argument("--generations", type=int, default=8, help="of a prompt")
    parser.add_argument("--completion_length", type=int, default=1024, help="tokens, of all")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each run")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before, 1 at least")
    parser.add_argument("--staleness", type=int, nargs="+", help="0 and 1; with one GPU 0")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--timeout_s", type=float, default=580, help="of each run")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args()
    if arguments.staleness is None:
        arguments.staleness = [0] if arguments.gpus == 1 else [0, 1]
    return arguments, options


if __name__ == "__main__":
    main()
