"""`rlsys infer MODEL_OR_RUN`: chat, complete a file of prompts, or serve the model over HTTP."""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from pathlib import Path
from typing import Any

from rlsys.commands.merged_model import with_merged_adapter
from rlsys.config.dataset_spec import parse_spec
from rlsys.config.yaml_text import read_yaml
from rlsys.engines.vllm.serving import (
    EngineOptions,
    serve_command,
    serving_arguments,
    serving_env,
)
from rlsys.model.tokenizer_files import chat_template
from rlsys.preflight.devices import visible_gpus
from rlsys.run.model_source import ModelSource, find_model

SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "max_tokens": int, "seed": int}
"""Options of sampling and their types; the names are vLLM's."""
_RANGES = {
    "temperature": (0.0, None),
    "top_p": (0.0, 1.0),
    "top_k": (-1, None),
    "max_tokens": (1, None),
    "seed": (0, None),
}


def main(args: argparse.Namespace) -> None:
    """Chat with `args.model`, or do what `--prompts` or `--serve` asks for."""
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    for name, value in sampling.items():
        check_sampling(name, value)
    _check_options(args, sampling)
    source = with_merged_adapter(find_model(args.model, args.step))
    system, variables = prompt_settings(source, args.system)
    options = EngineOptions(
        device=args.device or ("cuda" if visible_gpus() else "cpu"),
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    arguments = serving_arguments(source.folder, options)
    env = serving_env(options.device)
    if args.serve:
        _serve(args, source, options, env)
    os.environ |= env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process, one import
    if args.prompts is not None:
        from rlsys.commands.infer_batch import complete_file, read_batch

        batch = read_batch(args, source, sampling, system, variables)
        if not batch.is_complete:
            complete_file(batch, start_engine(source, arguments, sampling), sampling)
        return
    from rlsys.commands.infer_chat import chat

    chat(start_engine(source, arguments, sampling), source, system, sampling, variables)


def prompt_settings(source: ModelSource, system: str | None) -> tuple[str | None, dict[str, Any]]:
    """The system message and the variables of the chat template.

    A run's own (data.system, data.chat_template_kwargs), so that the model sees the prompts that it
    was trained on; the user's `system` wins, and "" is none.
    """
    own: dict[str, Any] = {}
    if source.run is not None and source.run.config.is_file():
        values = read_yaml(source.run.config)
        own = values.get("data") or {} if isinstance(values, dict) else {}
    variables = own.get("chat_template_kwargs") or {}
    used = {"chat_template_kwargs": variables} if variables else {}
    if system is None and own.get("system"):
        system = own["system"]
        used["system"] = system
    for name, value in used.items():
        print(f"note: as in the run, data.{name}: {value}", file=sys.stderr)
    return system or None, variables


def check_sampling(name: str, value: float) -> None:
    """Refuse a value that vLLM does not take.

    Raises:
        ValueError: it names the option and its range.
    """
    least, most = _RANGES[name]
    # top_p 0 would leave no token; top_k 0 and -1 are off.
    if (name == "top_p" and value == 0) or value < least or (most is not None and value > most):
        above = "above 0" if name == "top_p" else f"at least {least:g}"
        limit = "" if most is None else f" and at most {most:g}"
        raise ValueError(f"--{name} {value:g} should be {above}{limit}")


def start_engine(source: ModelSource, arguments: dict[str, Any], sampling: dict[str, Any]) -> Any:
    """Load the model; says so on standard error, since standard output is for answers."""
    print(f"loading {source.folder}", file=sys.stderr, flush=True)
    warnings.simplefilter("ignore", FutureWarning)  # of vLLM's own use of torch
    from rlsys.engines.vllm.text_engine import TextEngine  # takes seconds

    seed = sampling.get("seed", random.SystemRandom().randrange(2**31))
    return TextEngine(source.folder, arguments, seed=seed)


def _check_options(args: argparse.Namespace, sampling: dict[str, Any]) -> None:
    """Refuse options that the chosen mode does not read.

    Raises:
        ValueError: it names them.
    """
    if args.serve and args.prompts is not None:
        raise ValueError("--serve and --prompts are two different things: leave one out")
    if (args.prompts is None) != (args.out is None):
        raise ValueError("--prompts FILE and --out FILE belong together: give both")
    if args.prompts is not None:
        _check_file(args.prompts)
    for name in ("max_model_len", "tensor_parallel_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} should be at least 1")
    for_server = {"host": args.host, "port": args.port, "served_model_name": args.served_model_name}
    unread = [f"--{name}" for name, value in for_server.items() if value is not None]
    unread += ["--vllm_args"] if args.vllm_args else []
    if not args.serve and unread:
        raise ValueError(f"{', '.join(unread)}: only --serve reads this")
    asked = [f"--{name}" for name in sampling if name != "seed"]
    asked += ["--system"] if args.system is not None else []
    if args.serve and asked:
        raise ValueError(
            f"{', '.join(asked)}: clients of --serve say this in their requests. Defaults come "
            "from generation_config.json; `--vllm_args --override-generation-config JSON` "
            "replaces them"
        )


def _check_file(prompts: str) -> None:
    """Refuse a file that is not there, before a model is looked for and a hub is asked.

    Raises:
        ValueError: it is neither here nor OWNER/NAME, or marked as a hub's.
    """
    spec = parse_spec(prompts)
    of_hub = spec.from_hub or ("/" in spec.name and not spec.is_local)
    if not of_hub and not spec.path.exists():
        raise ValueError(
            f"--prompts {prompts}: there is no such file. A dataset of a hub is OWNER/NAME"
        )


def _serve(
    args: argparse.Namespace, source: ModelSource, options: EngineOptions, env: dict[str, str]
) -> None:
    """Become vLLM's server: Ctrl-C and signals reach it, and no process stays behind."""
    host, port = args.host or "127.0.0.1", 8000 if args.port is None else args.port
    name = args.served_model_name or _served_name(source)
    command = serve_command(
        source.folder,
        options,
        names=list(dict.fromkeys([name, str(source.folder)])),
        host=host,
        port=port,
        seed=args.seed,
        more=args.vllm_args,
    )
    print(f"{source.label} will be {name!r} at http://{host}:{port}/v1 once it is loaded")
    if not chat_template(source.folder):
        print("note: the model has no chat template: clients can use /v1/completions only")
    asks_for_key = "--api-key" in args.vllm_args or "VLLM_API_KEY" in os.environ
    if host not in ("127.0.0.1", "localhost", "::1") and not asks_for_key:
        print(
            f"note: whoever reaches {host}:{port} can use the model; `--vllm_args --api-key KEY` "
            "asks for a key, and the variable VLLM_API_KEY does so without showing it to others"
        )
    sys.stdout.flush()
    env |= {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO")}
    os.execve(command[0], command, os.environ | env)


def _served_name(source: ModelSource) -> str:
    """A hub id as it is; the name of a folder, for a checkpoint the name of its run too."""
    place = Path(source.name)
    if not place.is_dir():
        return source.name
    if source.run is not None and place.resolve() == source.saved.resolve():
        return f"{source.run.path.resolve().name}-{source.saved.name}"
    return place.resolve().name
