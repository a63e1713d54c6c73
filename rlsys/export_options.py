"""The command line of `rlsys export`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add SOURCE, OUT and all options."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="output_dir of a run, a checkpoint, a Hugging Face folder, a hub id, a folder of a "
        "LoRA adapter, or one that --to mcore wrote",
    )
    parser.add_argument(
        "--to",
        choices=("hf", "mcore"),
        required=True,
        help="hf: safetensors, for transformers and vLLM. mcore: megatron-core's torch_dist",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        *("--merge", "--merge_lora"),
        nargs="?",
        type=_boolean,
        const=True,
        default=False,
        metavar="true",
        help="of a LoRA adapter: write its base with the adapter merged in; without this, the "
        "adapter is written as PEFT folder",
    )
    parser.add_argument("--step", type=int, help="checkpoint of the run; default: newest weights")
    parser.add_argument(
        *("--dtype", "--torch_dtype"),
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        metavar="TYPE",
        help="type of the new weights: bfloat16, float16, float32, or auto, the default, which "
        "keeps that of each tensor",
    )
    parser.add_argument(
        "--max_shard_size",
        metavar="SIZE",
        help="with --to hf: size of a file at most, such as 5GB or 500MiB; default 5GB",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument(
        "--test_convert_precision",
        nargs="?",
        type=_boolean,
        const=True,
        default=False,
        metavar="true",
        help="compare the logits of both sides; exit code 1 if they differ",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="with --test_convert_precision: a text to compare logits on, or a file, one prompt a "
        "line or JSONL with `prompt` or `messages`; default: a few built-in texts",
    )
    parser.add_argument(
        "--per_layer",
        action="store_true",
        help="with --test_convert_precision: differences after each layer, too",
    )


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
