"""vLLM in this process for text that nobody trains on: streamed answers, and batches."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm import LLM, SamplingParams
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind

from rlsys.engines.vllm.settings import refusal
from rlsys.engines.vllm.worker_errors import raise_worker_errors
from rlsys.model.detokenize import Detokenizer

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of an answer."""

    text: str
    num_tokens: int
    """Tokens since the last piece; a token may have no text of its own yet."""
    finish_reason: str | None = None
    """Set in the last piece: "stop" or "length"."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole completion."""

    text: str
    token_ids: list[int]
    finish_reason: str


class TextEngine:
    """One vLLM engine in the calling process.

    Args:
        folder: Hugging Face model folder.
        arguments: of `vllm.LLM`, see `serving_arguments`.
        seed: of what is sampled without a seed of its own.

    Raises:
        ValueError: vLLM does not take the model or its settings.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], *, seed: int):
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
        try:
            with raise_worker_errors():
                self._llm = LLM(
                    model=str(folder),
                    seed=seed,
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **arguments,
                )
        except ValidationError as error:
            raise ValueError(refusal(folder, error)) from None
        self._numbers = itertools.count()
        # Tags such as <think> may be special tokens, and people want to see them.
        self._skips_special = not Detokenizer(self.tokenizer, "auto").tags

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its completion together."""
        return int(self._llm.model_config.max_model_len)

    def defaults(self) -> dict[str, Any]:
        """The sampling parameters that generation_config.json asks for."""
        return dict(self._llm.model_config.get_diff_sampling_param())

    def stream(self, token_ids: Sequence[int], sampling: Mapping[str, Any]) -> Generator[Piece]:
        """The answer to a prompt, piece by piece; closing the iterator ends the sampling."""
        number = self._add(token_ids, sampling, RequestOutputKind.DELTA)
        try:
            while self._llm.llm_engine.has_unfinished_requests():
                for output in self._llm.llm_engine.step():
                    [part] = output.outputs
                    yield Piece(part.text, len(part.token_ids), part.finish_reason)
        finally:
            self._llm.llm_engine.abort_request([number])

    def answers(
        self, prompts: Iterable[tuple[K, Sequence[int], Mapping[str, Any]]]
    ) -> Iterator[tuple[K, Answer]]:
        """The answers to (key, token ids, sampling parameters), each as soon as it is finished."""
        keys = {
            self._add(token_ids, sampling, RequestOutputKind.FINAL_ONLY): key
            for key, token_ids, sampling in prompts
        }
        try:
            while self._llm.llm_engine.has_unfinished_requests():
                for output in self._llm.llm_engine.step():
                    [part] = output.outputs
                    reason = part.finish_reason
                    assert reason is not None
                    yield (
                        keys.pop(output.request_id),
                        Answer(part.text, list(part.token_ids), reason),
                    )
        finally:
            self._llm.llm_engine.abort_request(list(keys))

    def _add(
        self, token_ids: Sequence[int], sampling: Mapping[str, Any], kind: RequestOutputKind
    ) -> str:
        number = str(next(self._numbers))
        room = self.max_model_len - len(token_ids)
        limit = sampling.get("max_tokens")
        given = {**sampling, "max_tokens": room if limit is None else min(limit, room)}
        params = SamplingParams(**given, skip_special_tokens=self._skips_special, output_kind=kind)
        self._llm.llm_engine.add_request(number, tokens_input(list(token_ids)), params)
        return number
