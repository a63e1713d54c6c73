"""What distillation on a CPU needs: two untrained models with one tokenizer, and rows.

    python examples/distillation/prepare.py --out data/distillation

makes them up, without a network, and writes

    train.jsonl, validation.jsonl   Countdown problems with solutions, as messages
    teacher, student                untrained models of 0.64 and 0.26 million parameters

The same seed makes the same files. No problem of one split is in the other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "countdown"))
from problems import generate_problems, write_solutions
from starter_model import write_starter_model

STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
"""Sizes in which the student differs from the teacher."""


def write_student(teacher: Path, folder: Path, *, seed: int) -> None:
    """Write a smaller untrained model with the teacher's tokenizer."""
    config = Qwen3Config.from_pretrained(teacher)
    for name, value in STUDENT.items():
        setattr(config, name, value)
    config.layer_types = None  # follows the number of layers
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**config.to_diff_dict())).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (teacher / name).exists():
            (folder / name).write_bytes((teacher / name).read_bytes())


def main(argv: list[str] | None = None) -> None:
    """Command line: write rows and models."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--rows", type=int, default=12000, help="training rows; default 12000")
    parser.add_argument("--validation", type=int, default=256, help="held-out rows; default 256")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = generate_problems(args.rows, seed=1000 + args.seed, unique=False)
    write_solutions(args.out / "train.jsonl", rows)
    held_out = generate_problems(args.validation, seed=0, held_out=True)
    write_solutions(args.out / "validation.jsonl", held_out)
    write_starter_model(args.out / "teacher", seed=args.seed)
    write_student(args.out / "teacher", args.out / "student", seed=args.seed + 1)
    print(f"{args.out}: {args.rows} training and {args.validation} held-out rows, 2 models")


if __name__ == "__main__":
    main()
