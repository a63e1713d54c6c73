"""The rollout engine: vLLM in this process, token ids in and out, groups as they finish."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import ValidationError
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.inputs import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from rlsys.config import Config
from rlsys.engines.hf_checkpoint import resolve_model_path
from rlsys.engines.stop_tokens import read_stop_token_ids
from rlsys.engines.vllm_settings import engine_arguments
from rlsys.engines.vllm_weights import BACKEND, WORKER_EXTENSION, InitInfo
from rlsys.model_shape import read_model_shape
from rlsys.types import Completion, FinishReason, Prompt, RolloutGroup
from rlsys.weight_sync.plan import TensorMeta


class VLLMEngine:
    """One vLLM engine, driven step by step in the calling thread.

    Args:
        model_path: Hugging Face model folder or hub id.
        engine_rank: position among config.rollout.num_engines engines.

    Raises:
        ValueError: the model has no EOS token, or vLLM's own error about its settings.
    """

    def __init__(
        self,
        model_path: str,
        *,
        config: Config,
        device: Literal["cpu", "cuda"],
        engine_rank: int,
    ):
        folder = resolve_model_path(model_path)
        self._config = config
        self._engine_rank = engine_rank
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._stop_token_ids = read_stop_token_ids(folder, self._tokenizer)
        shape = read_model_shape(folder)
        self._llm = _start_llm(
            folder, engine_arguments(config, shape, device=device, engine_rank=engine_rank)
        )
        self.policy_version = 0
        """Version of the weights that it samples with; 0 are those of `model_path`."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_ids: Sequence[int],
        *,
        step: int,
        num_generations: int,
        temperature: float,
    ) -> Iterator[RolloutGroup]:
        """Sample `num_generations` completions of each prompt.

        Yields each group as soon as its completions are finished, while others still run. Closing
        the iterator early gives up what still runs.

        Args:
            group_ids: one per prompt, unique; they come back in the groups and seed the sampling.
            step: seeds the sampling too.
            temperature: of sampling and of the log-probs; 0 is greedy.

        Raises:
            ValueError: a prompt is longer than data.max_prompt_length.
        """
        engine = self._llm.llm_engine
        assert not engine.has_unfinished_requests(), "one generate at a time"
        running: dict[str, tuple[int, Prompt]] = {}
        try:
            for group_id, prompt in zip(group_ids, prompts, strict=True):
                self._check_length(prompt)
                parameters = self._sampling_parameters(step, group_id, num_generations, temperature)
                engine.add_request(str(group_id), tokens_input(prompt.token_ids), parameters)
                running[str(group_id)] = (group_id, prompt)
            while engine.has_unfinished_requests():
                for output in engine.step():
                    assert isinstance(output, RequestOutput)
                    group_id, prompt = running.pop(output.request_id)
                    yield self._group(group_id, prompt, output)
        finally:
            if running:
                engine.abort_request(list(running))

    def connect_weight_sync(
        self,
        *,
        transport: str,
        address: str,
        port: int,
        world_size: int,
        bucket_bytes: int,
        verify: bool,
        in_place: bool,
        timeout_s: float,
        metadata: Sequence[TensorMeta],
    ) -> None:
        """Let this engine's workers join the weight sync group, behind rank 0 and other engines."""
        init = InitInfo(
            transport=transport,
            address=address,
            port=port,
            first_rank=1 + self._engine_rank * self._config.rollout.tensor_parallel_size,
            world_size=world_size,
            bucket_bytes=bucket_bytes,
            verify=verify,
            in_place=in_place,
            timeout_s=timeout_s,
            metadata=[(meta.name, meta.dtype, meta.shape) for meta in metadata],
        )
        self._llm.init_weight_transfer_engine(init.as_request())

    def start_weight_update(self) -> None:
        """Sampling stops until `finish_weight_update`; nothing may be running."""
        assert not self._llm.llm_engine.has_unfinished_requests(), "still sampling"
        self._llm.start_weight_update()

    def update_weights(self) -> list[list[int]]:
        """Receive and load all buckets; returns the checksums of each worker, by bucket."""
        self._llm.update_weights({"update_info": {}})
        return self._llm.collective_rpc("received_checksums")

    def finish_weight_update(self, policy_version: int) -> int:
        """Sample with the new weights from now on; returns the version now held."""
        self._llm.finish_weight_update()
        # vLLM keeps the KV blocks of earlier prompts, computed with the old weights.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache after a weight update")
        self.policy_version = policy_version
        return self.policy_version

    def _sampling_parameters(
        self, step: int, group_id: int, num_generations: int, temperature: float
    ) -> SamplingParams:
        rollout = self._config.rollout
        seed = None
        if rollout.seed_per_request:
            seed = request_seed(self._config.seed, step, group_id)
        return SamplingParams(
            n=num_generations,
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=rollout.max_completion_length,
            stop_token_ids=self._stop_token_ids,
            seed=seed,
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _check_length(self, prompt: Prompt) -> None:
        limit = self._config.data.max_prompt_length
        if len(prompt.token_ids) > limit:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has {len(prompt.token_ids)} tokens, more than "
                f"data.max_prompt_length = {limit}: drop it or raise the limit"
            )

    def _group(self, group_id: int, prompt: Prompt, output: RequestOutput) -> RolloutGroup:
        completions = [self._completion(sampled) for sampled in output.outputs]
        return RolloutGroup(group_id=group_id, prompt=prompt, completions=completions)

    def _completion(self, sampled: CompletionOutput) -> Completion:
        assert isinstance(sampled.logprobs, FlatLogprobs)
        token_ids, logprobs = list(sampled.token_ids), list(sampled.logprobs.logprobs)
        assert len(logprobs) == len(token_ids), (len(logprobs), len(token_ids))
        reason = sampled.finish_reason
        if reason not in get_args(FinishReason):
            raise RuntimeError(f"vLLM ended a completion with {reason!r}")
        text_ids = token_ids[:-1] if reason == "stop" else token_ids
        return Completion(
            token_ids=token_ids,
            rollout_logprobs=logprobs,
            text=str(self._tokenizer.decode(text_ids, skip_special_tokens=True)),
            finish_reason=cast(FinishReason, reason),
            policy_versions=(self.policy_version,),
        )


def _start_llm(folder: Path, arguments: dict[str, Any]) -> LLM:
    try:
        return LLM(
            model=str(folder),
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            worker_extension_cls=WORKER_EXTENSION,
            **arguments,
        )
    except ValidationError as error:  # cannot be sent to another process as it is
        reasons = "; ".join(problem["msg"] for problem in error.errors())
        raise ValueError(f"vLLM does not take these settings: {reasons}") from None


def request_seed(seed: int, step: int, group_id: int) -> int:
    """The seed of one prompt's completions in one step; completion i is sampled with seed + i.

    The first 8 bytes of BLAKE2b over "seed:step:group_id", so it depends on nothing but these
    numbers: not on the engine, the process or the order of sampling.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{group_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # room for + i within a signed 64-bit number
