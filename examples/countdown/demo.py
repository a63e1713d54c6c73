"""Watch a small language model learn the Countdown game, on CPU: what `make demo` runs.

    python examples/countdown/demo.py [--seed 0] [--runs runs]

1. writes Countdown problems; those for evaluation are never trained on, whatever the seed,
2. runs `rlsys sft examples/countdown/warm_start.yaml`: a small model learns from solutions until it
   solves more than a quarter of the problems,
3. runs `rlsys grpo examples/countdown/demo.yaml`,
4. prints the held-out accuracy before and after, and the same problems solved by both.

The data and the warm start are kept and used again; every GRPO run gets a folder of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from problems import generate_problems, write_problems, write_solutions
from rich.console import Console
from rich.table import Table
from rich.text import Text
from starter_model import write_starter_model

from rlsys.files import read_jsonl
from rlsys.run.folder import RunDir

HERE = Path(__file__).parent
NUM_TRAIN, NUM_HELD_OUT = 4000, 256
NUM_SOLUTIONS = 12_000
"""Rows of the warm start: some problems come again, in another order or with another solution."""
COUNTDOWN = "eval/rewards/countdown/mean"


def main() -> int:
    """Run the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the warm start and of GRPO")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder to write to")
    args = parser.parse_args()
    console = Console()
    start = time.monotonic()
    data = args.runs / "countdown-data"
    if not (data / "validation.jsonl").exists():
        held_out = generate_problems(NUM_HELD_OUT, seed=0, held_out=True)
        write_problems(data / "train.jsonl", generate_problems(NUM_TRAIN, seed=0))
        write_problems(data / "validation.jsonl", held_out)
    model = warm_started_model(args.runs, data, args.seed, console)
    run = RunDir(_new_folder(args.runs / f"countdown-demo-seed{args.seed}"))
    console.rule(f"GRPO -> {run.path}")
    grpo_start = time.monotonic()
    code = _rlsys(
        *("grpo", str(HERE / "demo.yaml"), "--seed", str(args.seed)),
        *("--output_dir", str(run.path), "--model.path", str(model)),
        *("--data.dataset", str(data / "train.jsonl")),
        *("--data.val_dataset", str(data / "validation.jsonl")),
    )
    if code != 0:
        return code
    _report(run, console)
    end = time.monotonic()
    console.print(
        f"GRPO took {(end - grpo_start) / 60:.1f} minutes, everything {(end - start) / 60:.1f}. "
        f"Read all completions with: rlsys completions {run.path}"
    )
    return 0


def warm_started_model(runs: Path, data: Path, seed: int, console: Console) -> Path:
    """The starter model after its warm start, made now or by an earlier call.

    Raises:
        SystemExit: the warm start failed, and said why.
    """
    run = RunDir(runs / f"countdown-warm-start-seed{seed}")
    if run.final.exists():
        console.print(f"The warm-started model in {run.final} is used again.")
        return run.final
    console.rule(f"Warm start on solutions -> {run.path}")
    untrained = runs / f"countdown-untrained-seed{seed}"
    write_starter_model(untrained, seed=seed)
    solutions, held_out = data / f"solutions-seed{seed}.jsonl", data / "solutions-held-out.jsonl"
    write_solutions(solutions, generate_problems(NUM_SOLUTIONS, seed=1000 + seed, unique=False))
    write_solutions(held_out, generate_problems(NUM_HELD_OUT, seed=0, held_out=True))
    code = _rlsys(
        *("sft", str(HERE / "warm_start.yaml"), "--overwrite"),
        *("--seed", str(seed), "--output_dir", str(run.path), "--model.path", str(untrained)),
        *("--data.dataset", str(solutions), "--data.val_dataset", str(held_out)),
    )
    if code != 0:
        raise SystemExit(code)
    return run.final


def _rlsys(*words: str) -> int:
    """Run a command of rlsys; returns its exit code."""
    return subprocess.run([sys.executable, "-m", "rlsys.cli", *words], check=False).returncode


def _new_folder(folder: Path) -> Path:
    """`folder`, or the first of `folder`-2, `folder`-3 ... that holds no run yet."""
    number = 1
    candidate = folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def _report(run: RunDir, console: Console) -> None:
    evaluations = [line for line in read_jsonl(run.metrics) if COUNTDOWN in line]
    before, after = evaluations[0], evaluations[-1]
    completions = list(read_jsonl(run.eval_completions))
    pairs = [
        tuple(_completion(completions, line["step"], group_id) for line in (before, after))
        for group_id in range(NUM_HELD_OUT)
    ]
    kinds: dict[str, list[tuple[dict[str, Any], ...]]] = {"learned": [], "lost": [], "kept": []}
    for pair in pairs:
        was_right, is_right = (_is_right(row) for row in pair)
        kinds["kept" if was_right == is_right else "learned" if is_right else "lost"].append(pair)
    table = Table(title="A held-out problem of each kind, before and after", show_lines=True)
    for column in ("problem", f"before (step {before['step']})", f"after (step {after['step']})"):
        table.add_column(column, overflow="fold")
    for pair in (pairs_of_kind[0] for pairs_of_kind in kinds.values() if pairs_of_kind):
        problem = pair[0]["prompt"].partition(". ")[0]
        table.add_row(Text(problem), *(_judged(row) for row in pair))
    console.print(table)
    console.print(
        f"Held-out pass@1 over {NUM_HELD_OUT} problems not seen in training: "
        f"{before[COUNTDOWN]:.3f} before, {after[COUNTDOWN]:.3f} after {after['step']} GRPO steps. "
        f"{len(kinds['learned'])} answers became right, {len(kinds['lost'])} became wrong."
    )
    console.print(f"Reward curve: {run.reward_curve}    trained model: {run.final}")


def _completion(completions: list[dict[str, Any]], step: int, group_id: int) -> dict[str, Any]:
    return next(c for c in completions if c["step"] == step and c["group_id"] == group_id)


def _judged(row: dict[str, Any]) -> Text:
    right = _is_right(row)
    return Text(f"{row['text']}\n{'right' if right else 'wrong'}", style="green" if right else "")


def _is_right(row: dict[str, Any]) -> bool:
    return row["rewards"]["countdown"] == 1.0


if __name__ == "__main__":
    sys.exit(main())
