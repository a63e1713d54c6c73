"""The stream of prompts that a run's rollouts take from."""

from __future__ import annotations

from itertools import islice

from rlsys.config import Config
from rlsys.data.load import PromptData
from rlsys.data.streams.base import PromptStream
from rlsys.data.streams.difficulty import DifficultySampling
from rlsys.data.streams.in_memory import InMemoryPrompts
from rlsys.data.streams.mixed import MixedPrompts


def make_prompt_stream(config: Config, data: PromptData) -> PromptStream:
    """Prompts in memory or streamed, mixed by data.dataset_weights, chosen by difficulty."""
    options, seed = config.data, config.seed
    stream: PromptStream
    if options.dataset_weights is not None:
        parts: list[PromptStream] = [*data.streams]
        prompts = iter(data.train)
        for index, size in enumerate(data.train_sizes):
            own = list(islice(prompts, size))
            parts.append(InMemoryPrompts(own, shuffle=options.shuffle, seed=seed + index))
        stream = MixedPrompts(parts, options.dataset_weights, seed=seed)
    elif options.streaming:
        [stream] = data.streams
    else:
        stream = InMemoryPrompts(data.train, shuffle=options.shuffle, seed=seed)
    if options.difficulty_sampling:
        stream = DifficultySampling(
            stream,
            patience=options.difficulty_patience,
            exploration=options.difficulty_exploration,
            seed=seed,
        )
    return stream
