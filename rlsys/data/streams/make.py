"""The stream that the steps of a run take from."""

from __future__ import annotations

from itertools import islice

from rlsys.config import Config, RowsConfig, SftConfig
from rlsys.data.load import Loaded, PromptData
from rlsys.data.samples import SampleData
from rlsys.data.streams.base import PromptStream, SampleStream, Stream, T
from rlsys.data.streams.by_length import ByLength
from rlsys.data.streams.difficulty import DifficultySampling
from rlsys.data.streams.in_memory import InMemory
from rlsys.data.streams.mixed import Mixed


def make_prompt_stream(config: Config, data: PromptData) -> PromptStream:
    """Prompts in memory or streamed, mixed by data.dataset_weights, chosen by difficulty."""
    options, seed = config.data, config.seed
    stream = make_stream(options, data, seed=seed)
    if options.difficulty_sampling:
        stream = DifficultySampling(
            stream,
            patience=options.difficulty_patience,
            exploration=options.difficulty_exploration,
            seed=seed,
        )
    return stream


def make_sample_stream(config: SftConfig, data: SampleData) -> SampleStream:
    """Samples in memory or streamed, mixed by data.dataset_weights, grouped by length."""
    stream = make_stream(config.data, data, seed=config.seed)
    if config.sft.group_by_length:
        return ByLength(
            stream, num_rows=len(data.train), batch_size=config.rows_per_step, seed=config.seed
        )
    return stream


def make_stream(options: RowsConfig, data: Loaded[T], *, seed: int) -> Stream[T]:
    """Prompts or samples in memory or streamed, mixed by data.dataset_weights."""
    if options.dataset_weights is not None:
        parts: list[Stream[T]] = [*data.streams]
        rows = iter(data.train)
        for index, size in enumerate(data.train_sizes):
            own = list(islice(rows, size))
            parts.append(InMemory(own, shuffle=options.shuffle, seed=seed + index))
        return Mixed(parts, options.dataset_weights, seed=seed)
    if options.streaming:
        [stream] = data.streams
        return stream
    return InMemory(data.train, shuffle=options.shuffle, seed=seed)
