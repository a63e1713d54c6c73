"""`rlsys export` of a LoRA adapter that is not merged: another PEFT folder."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlsys.engines.megatron.hf_folder import converted
from rlsys.files import bytes_in, replacing_folder, size_text
from rlsys.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from rlsys.model.folder import read_json
from rlsys.model.stored_adapter import StoredAdapter
from rlsys.problems import Problem, ProblemsError
from rlsys.run.model_source import ModelSource


def copy_adapter(source: ModelSource, adapter: StoredAdapter, args: argparse.Namespace) -> None:
    """Write the adapter, its tokenizer, and where its base is, into a PEFT folder.

    Raises:
        ProblemsError: an option is for models, or the folder cannot be written.
    """
    from rlsys.commands.export import place_problems

    out: Path = args.out.expanduser()
    problems = [
        *_unread_options(args),
        *place_problems(out, adapter.folder, overwrite=args.overwrite, has=CONFIG_FILE),
    ]
    if problems:
        raise ProblemsError(f"the export of {args.source}", list(map(Problem, problems)))
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    tensors = {
        name: converted(name, tensor, dtype) for name, tensor in load_file(adapter.weights).items()
    }
    config = read_json(adapter.folder / CONFIG_FILE)
    if Path(adapter.base).is_dir():
        config["base_model_name_or_path"] = str(source.folder.resolve())
    with replacing_folder(out) as partial:
        for file in adapter.folder.iterdir():
            if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt", ".md"):
                shutil.copyfile(file, partial / file.name)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copymode(partial / CONFIG_FILE, partial / WEIGHTS_FILE)
    print(
        f"wrote {out}: a LoRA adapter of {adapter.base} in PEFT's format, "
        f"{size_text(bytes_in(out))}; with --merge it is a model of its own",
        flush=True,
    )


def _unread_options(args: argparse.Namespace) -> Iterator[str]:
    given = {
        "--to mcore": args.to == "mcore",
        "--max_shard_size": args.max_shard_size is not None,
        "--test_convert_precision": args.test_convert_precision,
        "--prompts": args.prompts is not None,
        "--per_layer": args.per_layer,
    }
    named = [option for option, is_given in given.items() if is_given]
    if named:
        yield (
            f"{', '.join(named)}: for models, and {args.source} is a LoRA adapter: add --merge, or "
            "leave them out"
        )
