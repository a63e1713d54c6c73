"""Whether the files of a model folder fit each other, and the prompts of a run the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.model.keys import ignored_prose
from rlsys.model.shape import ModelShape, read_model_config, read_model_shape
from rlsys.model.tokenizer_files import (
    TOKENIZER_FILES,
    chat_template,
    id_gap_notes,
    num_token_ids,
    resize_remedy,
    tokenizer_problems,
)
from rlsys.model.weight_files import (
    INDEX,
    is_lfs_pointer,
    lfs_problem,
    weight_file_problems,
    weight_files,
    weight_table_problems,
)
from rlsys.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_ROWS = 5
"""Rows that are named of those with one and the same mistake."""


def model_folder_problems(folder: Path, shape: ModelShape, *, has_prompts: bool) -> list[str]:
    """Where the files of a model folder are missing, broken, or do not fit each other.

    Args:
        shape: of its config.json.
        has_prompts: its tokenizer and chat template write the prompts.
    """
    names = (*TOKENIZER_FILES, "generation_config.json", INDEX) if has_prompts else (INDEX,)
    unreadable = list(_json_problems([folder / name for name in names]))
    if unreadable:
        return unreadable
    if not weight_files(folder):
        problems = [f"{folder} holds no .safetensors file, so no weights"]
    else:
        broken = list(weight_file_problems(folder))
        problems = broken or list(weight_table_problems(folder, shape))
    if not has_prompts:
        return problems
    if not (folder / "tokenizer.json").is_file() and not any(folder.glob("*.model")):
        return [*problems, f"{folder} holds no tokenizer.json, so no tokenizer"]
    if not chat_template(folder):
        problems.append(
            f"the tokenizer of {folder} has no chat template, which turns messages into a prompt: "
            "use an instruct model, or add a chat_template.jinja to the folder"
        )
    return [*problems, *tokenizer_problems(folder, shape)]


def _json_problems(files: Sequence[Path]) -> Iterator[str]:
    """JSON files that cannot be read, of those that are there."""
    for file in filter(Path.is_file, files):
        if is_lfs_pointer(file):
            yield lfs_problem(file)
            continue
        try:
            content = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            yield f"{file} is not valid JSON: {error}. Download it again"
            continue
        if not isinstance(content, dict) or (file.name == INDEX and "weight_map" not in content):
            missing = " with weight_map" if file.name == INDEX else ""
            yield f"{file} is not a JSON object{missing}: download it again"


def check_model_folder(folder: Path, *, has_prompts: bool) -> None:
    """The same of a folder that came from the hub, so that preflight could not look into it.

    Raises:
        ValueError: what is wrong with it.
    """
    problems = model_folder_problems(folder, read_model_shape(folder), has_prompts=has_prompts)
    if problems:
        raise ValueError("\n".join(problems))


def model_notes(folder: Path) -> list[str]:
    """What a run ignores of config.json, and cannot show of completions; for people."""
    prose = ignored_prose(read_model_config(folder))
    ignored = [f"{folder / 'config.json'}: {', '.join(prose)} ignored"] if prose else []
    return [*ignored, *id_gap_notes(folder)]


def check_prompt_tokens(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]
) -> None:
    """Refuse prompts with a token that the model has no embedding for.

    Raises:
        ValueError: names rows, the token, both sizes and the remedy.
    """
    size, known = read_model_shape(folder).vocab_size, num_token_ids(folder)
    if known is not None and known <= size:
        return
    wrong = list(_rows_outside(prompts, size))
    if not wrong:
        return
    rows = ", ".join(prompt_id for prompt_id, _ in wrong[:_MAX_ROWS])
    rows += f" and {len(wrong) - _MAX_ROWS} more" if len(wrong) > _MAX_ROWS else ""
    token_id = wrong[0][1]
    raise ValueError(
        f"the prompt of {rows} holds the token {tokenizer.convert_ids_to_tokens(token_id)!r} of id "
        f"{token_id}, the tokenizer of {folder} has {len(tokenizer):,} tokens and its model "
        f"embeddings for {size:,} (vocab_size in config.json). {resize_remedy(len(tokenizer))}"
    )


def _rows_outside(prompts: Iterable[Prompt], size: int) -> Iterator[tuple[str, int]]:
    """Row and largest token id of prompts with ids that are not below `size`."""
    for prompt in prompts:
        largest = max(prompt.token_ids)
        if largest >= size:
            yield prompt.prompt_id, largest
