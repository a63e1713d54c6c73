"""`rlsys export SOURCE --to hf|mcore OUT`: a model in another format, type or number of files.

With `--merge` a LoRA adapter becomes a model: its base, changed.

One process on CPU, whatever the world size of the run was; without Ray, vLLM and GPU.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rlsys.commands.export_formats import read_dtypes, write_hf, write_mcore
from rlsys.engines.megatron.mcore_files import check_mcore_files, is_mcore_folder
from rlsys.engines.megatron.merge import MergedTensors
from rlsys.files import bytes_in, free_bytes, path_exists, size_text
from rlsys.model.families import FAMILIES
from rlsys.model.folder_check import vocabulary_notes, vocabulary_problems, weight_problems
from rlsys.model.shape import ModelShape, read_model_config, read_model_shape
from rlsys.model.stored_adapter import StoredAdapter
from rlsys.model.tokenizer_files import has_tokenizer
from rlsys.problems import Problem, ProblemsError
from rlsys.run.folder import RunDir
from rlsys.run.model_source import ModelSource, find_model
from rlsys.text import counted

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True, slots=True)
class Export:
    """What is converted into what."""

    folder: Path
    """The source, or its base."""
    adapter: StoredAdapter | None
    """The LoRA adapter that is merged."""
    label: str
    """The name of the source, for people."""
    is_mcore: bool
    """Whether the source is in megatron-core's format."""
    shape: ModelShape
    num_stored: Counter[torch.dtype]
    """Numbers of the source by type."""
    to: str
    """hf or mcore."""
    out: Path
    dtype: torch.dtype | None
    """None keeps what is stored."""
    max_shard_bytes: int

    @property
    def main_dtype(self) -> torch.dtype:
        """The type in the new config.json; in megatron-core's format that of all weights."""
        if self.dtype is not None:
            return self.dtype
        if self.keeps_types:
            return self.num_stored.most_common(1)[0][0]
        # The widest of several types loses nothing.
        return max(self.num_stored, key=lambda dtype: (dtype.itemsize, self.num_stored[dtype]))

    @property
    def keeps_types(self) -> bool:
        """Whether each tensor keeps the type in which it is stored."""
        return self.dtype is None and self.to == "hf" and not self.is_mcore

    @property
    def rounds(self) -> bool:
        """Whether the new type cannot hold all numbers: stored ones, or sums with an adapter's."""
        if self.adapter is not None:
            return self.main_dtype != torch.float32
        return not self.keeps_types and any(
            torch.promote_types(stored, self.main_dtype) != self.main_dtype
            for stored in self.num_stored
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the new weights."""
        if self.keeps_types:
            return sum(dtype.itemsize * number for dtype, number in self.num_stored.items())
        return sum(self.num_stored.values()) * self.main_dtype.itemsize


def main(args: argparse.Namespace) -> bool | None:
    """Check everything, convert, and compare if asked; False if the two sides differ."""
    if args.max_shard_size is not None and args.to == "mcore":
        raise ValueError("--max_shard_size is for --to hf: leave it out")
    if (args.prompts is not None or args.per_layer) and not args.test_convert_precision:
        raise ValueError("--prompts and --per_layer are for --test_convert_precision: add it")
    is_mcore = is_mcore_folder(Path(args.source).expanduser())
    source = None if is_mcore else find_model(args.source, args.step)
    adapter = None if source is None else source.adapter
    if args.merge and adapter is None:
        raise ValueError(
            f"--merge is for LoRA adapters, and {args.source} is a model: leave it out"
        )
    if source is not None and adapter is not None and not args.merge:
        from rlsys.commands.export_adapter import copy_adapter

        copy_adapter(source, adapter, args)
        return None
    export = _plan(args, source)
    problems = list(map(Problem, _problems(export, overwrite=args.overwrite)))
    if problems:
        raise ProblemsError(f"the export of {args.source}", problems)
    prompts = None
    if args.test_convert_precision:
        from rlsys.commands.export_precision import read_prompts

        prompts = read_prompts(export.folder, args.prompts)  # before minutes of work
    for line in _describe(export):
        print(line, flush=True)
    start = time.monotonic()
    (write_hf if export.to == "hf" else write_mcore)(export)
    files = sum(path.is_file() for path in export.out.rglob("*"))
    print(
        f"wrote {export.out}: {counted(files, 'file')}, {size_text(bytes_in(export.out))}, "
        f"{time.monotonic() - start:.1f} s",
        flush=True,
    )
    if prompts is None:
        return None
    from rlsys.commands.export_precision import compare

    return compare(export, prompts, per_layer=args.per_layer)


def _exportable_shape(folder: Path) -> ModelShape:
    """The model's shape; raises ValueError for models that rlsys has no table of weights for."""
    values = read_model_config(folder)
    if values.get("model_type") not in FAMILIES and "text_config" not in values:
        raise ValueError(
            f"{folder}: rlsys export converts models of type {', '.join(FAMILIES)}, and this is a "
            f"{values.get('model_type')!r}. If mcore-bridge trained it (model.bridge), its "
            "checkpoints are Hugging Face folders already: copy one"
        )
    return read_model_shape(folder)


def _plan(args: argparse.Namespace, source: ModelSource | None) -> Export:
    """What to do with `source`; None is a folder of megatron-core."""
    is_mcore = source is None
    if source is None:
        if args.step is not None:
            raise ValueError("--step is for a run, and SOURCE is a folder of megatron-core")
        folder, label = Path(args.source).expanduser(), args.source
        check_mcore_files(folder)
    else:
        folder, label = source.folder, source.label
    shape = _exportable_shape(folder)
    if not is_mcore:
        problems = list(map(Problem, weight_problems(folder, shape)))
        if problems:
            raise ProblemsError(str(folder), problems)
    return Export(
        folder=folder,
        adapter=None if source is None else source.adapter,
        label=label,
        is_mcore=is_mcore,
        shape=shape,
        num_stored=read_dtypes(folder, shape, is_mcore=is_mcore),
        to=args.to,
        out=args.out.expanduser(),
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        max_shard_bytes=parse_size(args.max_shard_size or MAX_SHARD_SIZE),
    )


def _problems(export: Export, *, overwrite: bool) -> Iterator[str]:
    """What makes the export impossible, in the tokenizer and where it is written."""
    yield from vocabulary_problems(export.folder, export.shape)
    if export.adapter is not None:
        if has_tokenizer(export.adapter.folder):  # it replaces the base's
            yield from vocabulary_problems(export.adapter.folder, export.shape)
        if export.to == "mcore":
            yield "--merge is for --to hf: merge first, then export what that writes to mcore"
        try:
            MergedTensors(export.adapter).check_base(export.shape)
        except ValueError as error:
            yield str(error)
    sources = [export.folder] if export.adapter is None else [export.folder, export.adapter.folder]
    problems = [
        problem
        for source in sources
        for problem in place_problems(export.out, source, overwrite=overwrite)
    ]
    yield from dict.fromkeys(problems)
    if problems:
        return
    # The replaced folder is deleted when the new one is whole, so it is not room.
    small = sum(f.stat().st_size for f in export.folder.iterdir() if f.suffix == ".json")
    needed, free = export.num_bytes + small, free_bytes(export.out)
    if free < needed:
        yield (
            f"the disk of {export.out} has {size_text(free)} free, and the model takes "
            f"{size_text(needed)}: free some, choose a narrower --dtype, or another disk"
        )


def place_problems(
    out: Path, source: Path, *, overwrite: bool, has: str = "config.json"
) -> Iterator[str]:
    """What speaks against writing the folder `out`.

    Args:
        source: folder that is read.
        overwrite: whether a folder that is there may be replaced, if it has the file `has`.
    """
    real_out, real_source = out.absolute().resolve(), source.resolve()
    inside = real_out.is_relative_to(real_source) or real_source.is_relative_to(real_out)
    if inside:
        yield f"{out} is the source, or one lies in the other: choose another folder"
        return
    if path_exists(out):
        if not (out / has).is_file():
            yield (
                f"{out} exists and holds no {has}, so it is not "
                f"{'a model' if has == 'config.json' else 'an adapter'} folder, and --overwrite "
                "would not delete it: choose another folder"
            )
            return
        if not overwrite:
            yield f"{out} exists: choose another folder, or replace it with --overwrite"
            return
    obstacle = RunDir(out.parent).obstacle()
    if obstacle is not None:
        yield f"{out.parent} {obstacle}: choose another folder"


def _describe(export: Export) -> Iterator[str]:
    shape, width = export.shape, str(export.main_dtype).removeprefix("torch.")
    stored = " and ".join(str(d).removeprefix("torch.") for d, _ in export.num_stored.most_common())
    yield (
        f"{export.label}: {shape.model_type}, {shape.num_params:,} parameters in {stored}, "
        f"{'megatron-core' if export.is_mcore else 'Hugging Face'} format"
    )
    if export.adapter is not None:
        yield (
            f"merging the LoRA adapter {export.adapter.folder} into {export.folder}: W + scaling "
            f"B A in float32, rounded once to {width}"
        )
    for note in vocabulary_notes(export.folder, shape):
        yield f"note: {note}"
    if (
        export.dtype is not None
        and min(d.itemsize for d in export.num_stored) < export.dtype.itemsize
    ):
        yield f"note: {width} holds the stored numbers exactly, and adds no precision to them"
    if len(export.num_stored) > 1 and export.dtype is None and not export.keeps_types:
        yield f"note: all weights are written as {width}, the widest of the stored types"
    if export.is_mcore or export.to == "mcore":
        held = shape.num_params * export.main_dtype.itemsize
        yield f"note: megatron-core's format takes the whole model in memory, {size_text(held)}"
    yield f"writing {export.out} in {width}"


def parse_size(text: str) -> int:
    """Bytes of "5GB" or "500MiB", as transformers reads them: GB is 10**9, GiB is 2**30.

    Raises:
        ValueError: the text is something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(I?)B", text.strip().upper())
    base = 1024 if found and found[3] else 1000
    size = int(float(found[1]) * base ** ("KMGT".index(found[2]) + 1)) if found else 0
    if size == 0:
        raise ValueError(f"{text!r} is not a size such as 5GB, 500MB or 2GiB")
    return size
