"""The options of `rlsys completions`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_completions_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="output_dir of the run")
    parser.add_argument("--follow", action="store_true", help="wait for new completions")
    parser.add_argument("--step", metavar="A[:B]", help="only this step, or steps from A to B")
    parser.add_argument(
        "--limit",
        type=int,
        help="groups to show at most, the newest; completions, where they are searched or sorted",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--where", metavar="SQL", help="a condition such as 'countdown = 0 and format = 1'"
    )
    search.add_argument("--grep", metavar="TEXT", help="only completions that contain this text")
    search.add_argument(
        "--sort", metavar="COLUMN", help="reward, advantage, length, ...; the largest first"
    )
    search.add_argument("--ascending", action="store_true", help="with --sort: smallest first")
    search.add_argument("--columns", nargs="+", metavar="NAME", help="only these columns")
    search.add_argument(
        "--format", choices=("text", "json", "csv", "parquet"), default="text", help="default: text"
    )
    search.add_argument("--out", type=Path, metavar="FILE", help="not to the terminal")
    split = parser.add_mutually_exclusive_group()
    for name, text in (
        ("eval", "completions of held-out prompts"),
        ("filtered", "completions that dynamic sampling left out"),
    ):
        split.add_argument(f"--{name}", dest="split", action="store_const", const=name, help=text)
    parser.set_defaults(split="train")
