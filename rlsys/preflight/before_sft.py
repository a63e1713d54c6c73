"""What supervised training loads, checks and says before Ray and its actors start."""

from __future__ import annotations

from typing import TypeVar

from transformers import AutoTokenizer

from rlsys.config import SftConfig
from rlsys.data.samples import SampleData, SampleRules, load_samples
from rlsys.model.folder_check import model_notes
from rlsys.plugins.load import load_plugins
from rlsys.preflight.before_start import (
    find_model,
    policy_notes,
    say_what_was_found,
    step_notes,
)
from rlsys.preflight.sft import too_few
from rlsys.preflight.turn_ends import turn_end_note
from rlsys.text import counted

AnySftConfig = TypeVar("AnySftConfig", bound=SftConfig)


def load_sample_data(config: SftConfig) -> SampleData:
    """Load the samples of a run, with the chat template of its model, and check all of them.

    Raises:
        ValueError: rows or the model's files do not fit the run.
    """
    folder, shape = find_model(config)
    load_plugins(config.data.external_plugins)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    data = load_samples(
        config.data,
        tokenizer,
        SampleRules.of(config),
        seed=config.seed,
        vocab_size=shape.vocab_size,
    )
    end_note = turn_end_note(folder, tokenizer, data.some)
    notes = [*model_notes(folder), *policy_notes(config, folder, shape), end_note]
    say_what_was_found(notes, data)
    if not config.data.streaming:
        if len(data.train) < config.rows_per_step:
            raise ValueError(str(too_few(config, len(data.train))))
        tokens = sum(len(sample.token_ids) for sample in data.train)
        targets = sum(sample.num_targets for sample in data.train)
        print(
            f"data: {counted(len(data.train), 'sample')}, {tokens:,} tokens, {targets:,} of them "
            f"trained on",
            flush=True,
        )
    return data


def fit_to_samples(config: AnySftConfig, data: SampleData) -> AnySftConfig:
    """The config with the number of steps."""
    for note in step_notes(config, len(data.train)):
        print(note, flush=True)
    return config.with_steps(len(data.train))
