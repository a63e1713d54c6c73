"""Log-probs of sampled tokens, kept as vLLM's engine gives them until a completion ends.

vLLM itself makes Python objects of every token of every sequence as it comes, entries of five lists
at the least (`flat_logprobs`). At 512 sequences of a 1.5B model log-probs were a third of the time
of a decode step, most of which is Python: see docs/gpu.md. `CompletionOutput.cumulative_logprob`
stays 0 with this; nothing here reads it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.engine import output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists


class SampledLogprobs(LogprobsProcessor):
    """vLLM's processor for requests with `logprobs=0` and without `flat_logprobs`."""

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        pieces: Any = self.logprobs  # an empty list at first
        pieces.append(logprobs_lists.logprobs)


def keep_sampled_logprobs() -> None:
    """From now on every vLLM engine of this process works so."""
    output_processor.LogprobsProcessor = SampledLogprobs  # type: ignore[misc]


def sampled_logprobs(pieces: Any) -> list[float]:
    """Log-probs of a completion's tokens, in nats.

    Args:
        pieces: `CompletionOutput.logprobs`: [tokens, 1 + n] arrays with the sampled token first.
    """
    logprobs: list[float] = np.concatenate(pieces)[:, 0].tolist()
    return logprobs
