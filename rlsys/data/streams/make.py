"""From the data of a run to the stream that its rollouts take prompts from."""

from __future__ import annotations

from itertools import islice

from rlsys.config import Config
from rlsys.data.load import PromptData
from rlsys.data.streams.difficulty import DifficultySampling
from rlsys.data.streams.in_memory import MixedPrompts, PromptSource, PromptStream


def make_prompt_stream(config: Config, data: PromptData) -> PromptStream:
    """Prompts in memory or streamed, mixed by data.dataset_weights, chosen by difficulty."""
    stream: PromptStream
    if config.data.dataset_weights is not None:
        parts: list[PromptStream] = [*data.streams] or _one_for_each_dataset(config, data)
        stream = MixedPrompts(parts, config.data.dataset_weights, seed=config.seed)
    elif config.data.streaming:
        [stream] = data.streams
    else:
        stream = PromptSource(data.train, shuffle=config.data.shuffle, seed=config.seed)
    if config.data.difficulty_sampling:
        stream = DifficultySampling(
            stream,
            patience=config.data.difficulty_patience,
            exploration=config.data.difficulty_exploration,
            seed=config.seed,
        )
    return stream


def _one_for_each_dataset(config: Config, data: PromptData) -> list[PromptStream]:
    prompts = iter(data.train)
    return [
        PromptSource(
            list(islice(prompts, size)), shuffle=config.data.shuffle, seed=config.seed + index
        )
        for index, size in enumerate(data.train_sizes)
    ]
