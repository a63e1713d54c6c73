"""Options of `rlsys infer`, and how commands name a model."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_infer_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL_OR_RUN, sampling, a file of prompts, the server and the engine."""
    add_model(parser)
    sampling = parser.add_argument_group(
        "sampling", "where left out, generation_config.json of the model says it"
    )
    sampling.add_argument("--system", metavar="TEXT", help="system message")
    sampling.add_argument("--temperature", type=float, help="0 is greedy")
    sampling.add_argument("--top_p", type=float)
    sampling.add_argument("--top_k", type=int)
    sampling.add_argument("--max_tokens", type=int, help="default: as many as the context has")
    sampling.add_argument("--seed", type=int)
    batch = parser.add_argument_group("a file of prompts")
    batch.add_argument(
        "--prompts",
        metavar="FILE",
        help="rows as in data.dataset: messages, query, prompt, ... in JSONL, CSV, Parquet, ...",
    )
    batch.add_argument(
        "--out", type=Path, metavar="FILE", help="JSONL; what it holds already is not sampled again"
    )
    server = parser.add_argument_group("a server")
    server.add_argument(
        "--serve", action="store_true", help="start vLLM's OpenAI-compatible server"
    )
    server.add_argument("--host", help="default 127.0.0.1: only this machine can ask")
    server.add_argument("--port", type=int, help="default 8000")
    server.add_argument(
        "--served_model_name", metavar="NAME", help="default: name of run or folder"
    )
    server.add_argument(
        "--vllm_args",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="last: everything behind it goes to vLLM's server as it is",
    )
    engine = parser.add_argument_group("the engine")
    engine.add_argument("--device", choices=["cpu", "cuda"], help="default: GPUs if there are any")
    engine.add_argument(
        "--max_model_len", type=int, help="tokens of prompt and completion; default: what fits"
    )
    engine.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    engine.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs; default 1")
    engine.add_argument("--gpu_memory_utilization", type=float, default=0.9, help="default 0.9")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL_OR_RUN and the step of its checkpoint."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_RUN",
        help="output_dir of a run, a checkpoint, a folder of a model or LoRA adapter, or a hub id",
    )
    parser.add_argument("--step", type=int, help="checkpoint of the run; default: newest")
