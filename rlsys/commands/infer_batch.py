"""Completions of a file of prompts: written as they come, continued after an interruption."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich.progress import track
from transformers import AutoTokenizer

from rlsys.config import DataConfig
from rlsys.data import load_prompts
from rlsys.files import JsonlWriter, drop_torn_line, read_jsonl, write_jsonl
from rlsys.run.model_source import ModelSource
from rlsys.text import counted
from rlsys.types import Prompt

if TYPE_CHECKING:
    from rlsys.engines.vllm.text_engine import Answer, TextEngine

_NO_LIMIT = 2**31
"""Tokens of a prompt; the model's own limit is known once it is loaded."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The prompts of a file, and the completions that an earlier process has written."""

    prompts: list[Prompt]
    out: Path
    about: dict[str, Any]
    """What every row of `out` says of its completion: model and sampling."""
    done: dict[str, dict[str, Any]]
    """Rows of `out` by prompt_id."""

    @property
    def is_complete(self) -> bool:
        """Whether every prompt has its completion."""
        return len(self.done) == len(self.prompts)


def read_batch(
    args: argparse.Namespace,
    source: ModelSource,
    sampling: dict[str, Any],
    system: str | None,
    variables: dict[str, Any],
) -> Batch:
    """Read the prompts of `args.prompts` and what `args.out` holds already.

    `variables` are what the chat template reads.

    Raises:
        ValueError: rows that cannot be read, or completions of something else in `args.out`.
    """
    tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    try:
        config = DataConfig(
            dataset=[args.prompts],
            system=system,
            chat_template_kwargs=variables,
            max_prompt_length=_NO_LIMIT,
            shuffle=False,
        )
    except ValidationError as error:
        raise ValueError(f"--prompts {args.prompts}: {error.errors()[0]['msg']}") from None
    prompts = load_prompts(config, tokenizer, seed=0).train
    out: Path = args.out
    # Sampling may come from generation_config.json, so it is the model's and not repeated here.
    about = {"model": source.label, "sampling": sampling}
    done = _written(out, prompts, about)
    if done:
        print(
            f"{out} holds {len(done):,} of {counted(len(prompts), 'completion')}", file=sys.stderr
        )
    return Batch(prompts, out, about, done)


def _written(out: Path, prompts: list[Prompt], about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of `out` by prompt_id.

    Raises:
        ValueError: they are of other prompts, another model or other sampling.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    drop_torn_line(out)
    rows = {str(row.get("prompt_id")): row for row in read_jsonl(out)} if out.exists() else {}
    messages = {prompt.prompt_id: prompt.messages for prompt in prompts}
    for prompt_id, row in rows.items():
        for name, value in about.items():
            if row.get(name) != value:
                raise ValueError(
                    f"--out {out} holds completions with {name} {row.get(name)!r}, and this would "
                    f"add {value!r}: name another file, or delete it"
                )
        if messages.get(prompt_id) != row.get("messages"):
            raise ValueError(
                f"--out {out} holds a completion of {prompt_id!r}, which is not this prompt of "
                "--prompts: name another file, or delete it"
            )
    return rows


def complete_file(batch: Batch, engine: TextEngine, sampling: dict[str, Any]) -> None:
    """Write the missing completions, and in the end all in the order of the prompts.

    Raises:
        ValueError: a prompt leaves no room for a completion; nothing is sampled then.
    """
    _check_lengths(batch.prompts, engine.max_model_len)
    defaults = engine.defaults() | sampling
    seed = defaults.pop("seed", None)
    asked = (
        # Each prompt has its own seed, so that a continued file equals an uninterrupted one.
        (prompt, prompt.token_ids, defaults | ({} if seed is None else {"seed": seed + number}))
        for number, prompt in enumerate(batch.prompts)
        if prompt.prompt_id not in batch.done
    )
    rows, writer = dict(batch.done), JsonlWriter(batch.out)
    try:
        for row in track(
            _rows(engine.answers(asked), batch.about),
            description="completions",
            total=len(batch.prompts) - len(batch.done),
            disable=not sys.stderr.isatty(),
        ):
            writer.append(row)
            rows[row["prompt_id"]] = row
    finally:
        writer.close()
    write_jsonl(batch.out, (rows[prompt.prompt_id] for prompt in batch.prompts))
    cut = sum(row["finish_reason"] == "length" for row in rows.values())
    print(f"{counted(len(rows), 'completion')} in {batch.out}, {cut:,} cut", file=sys.stderr)


def _rows(
    answers: Iterator[tuple[Prompt, Answer]], about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for prompt, answer in answers:
        row = {
            "prompt_id": prompt.prompt_id,
            "messages": prompt.messages,
            "completion": answer.text,
            "finish_reason": answer.finish_reason,
            "num_prompt_tokens": len(prompt.token_ids),
            "num_tokens": len(answer.token_ids),
            **about,
        }
        columns = prompt.columns.items()
        yield row | {f"dataset/{n}" if n in row else n: value for n, value in columns}


def _check_lengths(prompts: list[Prompt], most: int) -> None:
    long = [prompt for prompt in prompts if len(prompt.token_ids) >= most]
    if long:
        first = long[0]
        raise ValueError(
            f"{counted(len(long), 'prompt')} with {most:,} tokens or more leave no room for a "
            f"completion, the first is {first.prompt_id} with {len(first.token_ids):,}: raise "
            "--max_model_len, or take them out"
        )
