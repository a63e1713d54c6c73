"""What training a score head loads, checks and says before Ray and its actors start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from rlsys.config import RewardModelConfig
from rlsys.data.scored import ScoreData, load_scored
from rlsys.data.scored_rows import ScoreRules
from rlsys.model.classifier import pad_token_id
from rlsys.model.families.base import SCORE
from rlsys.model.folder_check import model_notes
from rlsys.model.weight_files import read_header, weight_files
from rlsys.plugins.load import load_plugins
from rlsys.preflight.before_start import find_model, policy_notes, say_what_was_found, step_notes
from rlsys.preflight.reward_model import too_few
from rlsys.text import counted


def load_score_data(config: RewardModelConfig) -> ScoreData:
    """Load the rows of a run, with the chat template of its model, and check all of them.

    Raises:
        ValueError: rows or the model's files do not fit the run.
    """
    folder, shape = find_model(config)
    load_plugins(config.data.external_plugins)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pad = pad_token_id(tokenizer)
    if pad is None:
        raise ValueError(
            f"the tokenizer of {folder} has neither a pad token nor EOS, by which classifiers of "
            "transformers find the last token of a text: set pad_token in its tokenizer_config.json"
        )
    data = load_scored(
        config.data,
        tokenizer,
        ScoreRules.of(config),
        seed=config.seed,
        pad_token_id=pad,
        vocab_size=shape.vocab_size,
    )
    notes = model_notes(folder, num_labels=config.num_labels)
    say_what_was_found([*notes, *policy_notes(config, folder, shape), _head_note(folder)], data)
    if not config.data.streaming:
        if len(data.train) < config.rows_per_step:
            raise ValueError(str(too_few(config, len(data.train))))
        for line in _summary(config, data):
            print(line, flush=True)
    return data


def fit_to_rows(config: RewardModelConfig, data: ScoreData) -> RewardModelConfig:
    """The config with the number of steps."""
    for note in step_notes(config, len(data.train)):
        print(note, flush=True)
    return config.with_steps(len(data.train))


def _head_note(folder: Path) -> str:
    stored = {name for file in weight_files(folder) for name in read_header(file)}
    if SCORE in stored:
        return f"the score head is that of {folder}"
    return f"{folder} has no score head: a new one starts with random numbers"


def _summary(config: RewardModelConfig, data: ScoreData) -> Iterator[str]:
    """Rows and tokens, and the number of rows of each class."""
    tokens = sum(len(text) for row in data.train for text in row.texts)
    noun = "pair" if config.has_pairs else "row"
    yield f"data: {counted(len(data.train), noun)}, {tokens:,} tokens"
    section = config.reward_model
    if section.problem_type == "single_label_classification":
        counts = Counter(int(row.label[0]) for row in data.train)
        numbers = [counts[label] for label in range(config.num_labels)]
    elif section.problem_type == "multi_label_classification":
        numbers = [int(sum(column)) for column in zip(*(r.label for r in data.train), strict=True)]
    else:
        return
    names = section.label_names or [str(label) for label in range(config.num_labels)]
    shown = ", ".join(f"{name} {count:,}" for name, count in zip(names, numbers, strict=True))
    yield f"data: rows of each class: {shown}"
    if missing := [name for name, count in zip(names, numbers, strict=True) if not count]:
        yield f"note: no row to train on has the class {', '.join(missing)}"
