"""The rollout engine: vLLM in this process; prompts in, groups out as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.inputs import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import output_processor
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists

from rlsys.config import Config
from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.engines.profiling import Traced
from rlsys.engines.vllm.adapters import adapter_request
from rlsys.engines.vllm.drafts import DraftCounter
from rlsys.engines.vllm.rope import rope_overrides
from rlsys.engines.vllm.routed_experts import check_captures_experts, experts_of_completion
from rlsys.engines.vllm.running import RunningGroup
from rlsys.engines.vllm.settings import engine_arguments, refusal, sampling_arguments
from rlsys.engines.vllm.sleeping import MEMORY_OF, TAGS, Tag
from rlsys.engines.vllm.weight_backend import BACKEND, WORKER_EXTENSION
from rlsys.engines.vllm.worker_errors import raise_worker_errors
from rlsys.model.adapters import syncs_adapter
from rlsys.model.detokenize import Detokenizer
from rlsys.model.engine_options import engine_option_problems
from rlsys.model.folder import resolve_model_path
from rlsys.model.shape import read_model_shape
from rlsys.model.stop_tokens import read_stop_rules
from rlsys.model.tokenizer_files import num_token_ids, resize_remedy
from rlsys.types import (
    Completion,
    Device,
    DraftCounts,
    FinishReason,
    Prompt,
    RolloutGroup,
    SampleRequest,
)
from rlsys.weight_sync.connection import Endpoint
from rlsys.weight_sync.plan import TensorSlice


class SampledLogprobs(LogprobsProcessor):
    """Log-probs of sampled tokens, kept as the arrays that vLLM's engine core returns.

    vLLM itself makes Python objects of every token of every sequence, which took a third of a
    decode step at 512 sequences of a 1.5B model: see docs/gpu.md. This one is for requests with
    `logprobs=0`. `CompletionOutput.cumulative_logprob` stays 0; nothing here reads it.
    """

    def _update_sample_logprobs(self, logprobs_lists: LogprobsLists) -> None:
        arrays: Any = self.logprobs  # an empty list at first
        arrays.append(logprobs_lists.logprobs)


class VLLMEngine:
    """One vLLM engine, driven step by step in the calling thread.

    Args:
        model_path: Hugging Face model folder or hub id.
        engine_rank: position among config.rollout.num_engines engines.

    Raises:
        ValueError: the model has no EOS token, or vLLM does not take it or its settings.
    """

    def __init__(
        self,
        model_path: str,
        *,
        config: Config,
        device: Device,
        engine_rank: int,
    ):
        folder = resolve_model_path(model_path)
        self._config = config
        self._engine_rank = engine_rank
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._stops = read_stop_rules(folder, self._tokenizer, config.rollout)
        self._detokenizer = Detokenizer(
            self._tokenizer, config.rollout.skip_special_tokens, self._stops.eos_token_ids
        )
        shape = read_model_shape(folder, may_bridge=True)
        self._shape = shape
        if config.rollout.router_replay:
            check_captures_experts()
        capability = torch.cuda.get_device_capability() if device == "cuda" else None
        for problem in engine_option_problems(config, device=device, capability=capability):
            raise ValueError(str(problem))
        shares_gpu = device == "cuda" and config.rollout.engines_per_gpu > 1
        arguments = engine_arguments(
            config,
            shape,
            device=device,
            engine_rank=engine_rank,
            gpu_bytes=torch.cuda.mem_get_info()[1] if shares_gpu else None,
        )
        if (draft := config.rollout.draft_model) is not None:
            arguments["speculative_config"] |= {"model": str(resolve_model_path(draft))}
        arguments["hf_overrides"] |= rope_overrides(
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
        )
        self._adapter = adapter_request() if syncs_adapter(config, shape, device) else None
        """The policy's LoRA adapter, which every request names; None for merged weights."""
        self._llm = _start_llm(folder, arguments)
        known = num_token_ids(folder)
        if known is not None and known < shape.vocab_size:
            self._llm.collective_rpc("sample_known_tokens_only", args=(known,))
        self.policy_version = 0
        """Version of the weights that it samples with; 0 stands for the weights in `model_path`."""
        self._running: dict[int, RunningGroup] = {}
        self._paused = False
        self._asleep: set[Tag] = set()
        """The kinds of GPU memory that it has given back."""
        self._has_weights = True
        self._drained: list[RequestOutput] = []
        """Outputs that finished while sampling was being paused."""
        engine_core = self._llm.llm_engine.engine_core.engine_core  # in this process
        self._steps_in_flight: int = engine_core.batch_queue_size
        self._drafts = DraftCounter(engine_core.scheduler)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: unfinished sequences, and no pause."""
        return bool(self._running) and not self._paused

    def add(self, requests: Sequence[SampleRequest]) -> None:
        """Begin to sample completions; `step` continues.

        Raises:
            ValueError: a prompt is longer than data.max_prompt_length, or has a token id beyond
                the model's embeddings. Then no request begins.
        """
        for request in requests:
            self._check_prompt(request.prompt)
        for request in requests:
            assert request.ticket not in self._running, request.ticket
            self._llm.llm_engine.add_request(
                str(request.ticket),
                tokens_input(request.prompt.token_ids, cache_salt=self._cache_salt()),
                SamplingParams(
                    **sampling_arguments(self._config.rollout, self._stops, request),
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
                lora_request=self._adapter,
            )
            self._running[request.ticket] = RunningGroup(request.prompt, self.policy_version)

    def step(self) -> list[RolloutGroup]:
        """Sample one token of every sequence that fits; returns the groups that this finished."""
        outputs, self._drained = self._drained, []
        return [self._group(output) for output in outputs or self._llm.llm_engine.step()]

    def abort(self, tickets: Iterable[int]) -> None:
        """Give up groups; unknown ones are ignored."""
        for ticket in tickets:
            self._llm.llm_engine.abort_request([str(ticket)])
            self._running.pop(ticket, None)
        self._drained = [out for out in self._drained if int(out.request_id) in self._running]

    def start_trace(self, operations: bool, memory: bool) -> None:
        """See TorchTrace: of each process that holds the model."""
        self._llm.collective_rpc("start_trace", args=(operations, memory))

    def stop_trace(self, folder: Path, member: str) -> list[Traced]:
        """See TorchTrace; nothing if it was not started."""
        traced = self._llm.collective_rpc(
            "stop_trace", args=(folder, f"{member}-{self._engine_rank}")
        )
        return [one for one in traced if one is not None]

    def draft_counts(self) -> DraftCounts:
        """The drafts of speculative decoding so far."""
        return self._drafts.counts

    def connect_weight_sync(self, endpoints: Sequence[Sequence[Endpoint]]) -> None:
        """Connect each worker to its endpoint [engine][worker]; earlier connections end."""
        own = endpoints[self._engine_rank]
        self._llm.init_weight_transfer_engine({"init_info": {"endpoints": own}})

    def needed_slices(self) -> list[tuple[TensorSlice, ...] | None]:
        """The slices that each worker needs; None for a worker that needs whole tensors."""
        return self.ask_workers("needed_slices")

    @property
    def is_asleep(self) -> bool:
        """Whether it waits for `wake`; it takes requests meanwhile, and samples nothing."""
        return bool(self._asleep)

    def sleep(self) -> None:
        """Pause sampling, between two tokens, and give back the memory of weights and KV cache.

        Completions in flight continue after `wake`, as after a weight sync with
        `rollout.in_flight_kv` = recompute: their keys and values are gone. Weights come back with
        the next weight sync. Only where that brings an adapter alone, they wait in host memory. On
        CPU, where vLLM cannot give memory back, all else is the same.
        """
        if self._asleep == set(TAGS):
            return
        if self.is_asleep:  # a weight sync has failed: vLLM falls asleep as a whole only
            self._wake_memory()
        else:
            self._pause()
        weights_go = self._adapter is None
        self._llm.collective_rpc("keep_memory", kwargs={"weights_go": weights_go})
        # It also preempts what is running, and drops the prefix cache.
        self._llm.sleep(level=2 if weights_go else 1, mode="keep")
        self._asleep = set(TAGS)
        self._has_weights = not weights_go

    def wake(self) -> None:
        """Take back the memory, and continue to sample.

        Raises:
            RuntimeError: no weights came since the engine fell asleep.
            torch.OutOfMemoryError: the GPU has too little free memory.
        """
        if not self._has_weights:
            raise RuntimeError(
                f"rollout engine {self._engine_rank} has no weights, which it dropped when it fell "
                "asleep: a weight sync has to come before it samples"
            )
        if self.is_asleep:
            self._wake_memory()
            self._llm.wake_up(tags=["scheduling"])
            self._paused = False

    def _wake_memory(self, *tags: Tag) -> None:
        """Take back memory of these kinds, or all."""
        size = "gpu_memory_utilization"
        if self._config.rollout.kv_cache_memory_mb is not None:
            size = "kv_cache_memory_mb"
        for tag in [tag for tag in tags or TAGS if tag in self._asleep]:
            with out_of_memory_explained(
                f"the {MEMORY_OF[tag]} of rollout engine {self._engine_rank}, which wakes up "
                f"beside what the policy keeps: lower rollout.{size}, or set "
                "colocated.offload_weights and colocated.offload_optimizer to true"
            ):
                self._llm.wake_up(tags=[tag])
            self._llm.collective_rpc("restore_memory", args=(tag,))
            self._asleep.remove(tag)

    def start_weight_update(self) -> None:
        """Pause sampling, between two tokens, until `update_weights` has ended.

        An engine that is asleep takes back the memory of its weights.
        """
        if self.is_asleep:
            self._wake_memory("weights")
        else:
            self._pause()
        self._llm.start_weight_update()

    def update_weights(self, policy_version: int) -> int:
        """Receive the weights of that version and sample with them; returns the version now held.

        Completions in flight continue with their next token. `rollout.in_flight_kv` says whether
        the keys and values of their tokens are recomputed or kept from the old weights. An engine
        that is asleep continues after `wake`. After the base of an adapter sampling stays paused
        until the adapter has come.

        Raises:
            WeightSyncError: no weights came, or damaged ones; sampling stays paused.
        """
        self._llm.update_weights({"update_info": {"policy_version": policy_version}})
        self._llm.finish_weight_update()
        has_adapter = all(self.ask_workers("use_adapter"))
        if self._adapter is not None and not has_adapter:
            return policy_version  # of the base alone: its adapter comes next
        self._has_weights = True
        if not self.is_asleep:
            self._drop_stale_cache()
        self._begin_version(policy_version)
        if not self.is_asleep:
            self._llm.wake_up(tags=["scheduling"])
            self._paused = False
        return self.policy_version

    def ask_workers(self, method: str) -> list[Any]:
        """Call a method of BucketWeightTransferEngine on every worker; returns the results."""
        return self._llm.collective_rpc("ask_weight_transfer", args=(method,))

    def _pause(self) -> None:
        """Schedule nothing more, and collect what is already being computed."""
        self._paused = True
        self._llm.sleep(level=0, mode="keep")
        engine = self._llm.llm_engine
        # vLLM computes a step while it handles the tokens of the step before. These calls empty its
        # queue of all but empty steps; everything in it was sampled with the current weights.
        for _ in range(self._steps_in_flight if self._running else 0):
            self._drained += engine.step()

    def _drop_stale_cache(self) -> None:
        """Drop the keys and values of earlier prompts, which the old weights computed."""
        keep = bool(self._running) and self._config.rollout.in_flight_kv == "keep"
        # Blocks in use cannot be dropped; `_cache_salt` keeps new prompts from using them.
        if not keep and not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM could not reset its prefix cache after a weight update")

    def _cache_salt(self) -> str | None:
        """Prompts share cached keys and values only within one weight version."""
        keep = self._config.rollout.in_flight_kv == "keep"
        return f"weights {self.policy_version}" if keep else None

    def _begin_version(self, policy_version: int) -> None:
        """Note where the new version begins in every unfinished completion."""
        self.policy_version = policy_version
        keeps_kv = self._config.rollout.in_flight_kv == "keep" and not self.is_asleep
        for state in self._llm.llm_engine.output_processor.request_states.values():
            running = self._running[int(state.external_req_id)]
            assert state.detokenizer is not None  # counts tokens, even if it decodes none
            running.begin_version(
                state.request_index,
                policy_version,
                num_tokens=state.detokenizer.num_output_tokens(),
                keeps_kv=keeps_kv,
            )

    def _check_prompt(self, prompt: Prompt) -> None:
        limit = self._config.data.max_prompt_length
        if len(prompt.token_ids) > limit:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has {len(prompt.token_ids)} tokens, more than "
                f"data.max_prompt_length = {limit}: drop it or raise the limit"
            )
        if max(prompt.token_ids) >= self._shape.vocab_size:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has the token id {max(prompt.token_ids)}, but the "
                f"model has embeddings for {self._shape.vocab_size:,} tokens (vocab_size in "
                "config.json). "
                f"{resize_remedy(len(self._tokenizer))}"
            )

    def _group(self, output: RequestOutput) -> RolloutGroup:
        ticket = int(output.request_id)
        running = self._running.pop(ticket)
        completions = [
            self._completion(sampled, running, index)
            for index, sampled in enumerate(output.outputs)
        ]
        return RolloutGroup(ticket=ticket, prompt=running.prompt, completions=completions)

    def _completion(
        self, sampled: CompletionOutput, running: RunningGroup, index: int
    ) -> Completion:
        spans = running.spans(index)
        reason = sampled.finish_reason
        if reason not in get_args(FinishReason):
            raise RuntimeError(f"vLLM ended a completion with {reason!r}")
        token_ids = list(sampled.token_ids)
        arrays: Any = sampled.logprobs  # [tokens, 1 + n], see SampledLogprobs
        logprobs: list[float] = np.concatenate(arrays)[:, 0].tolist()
        assert len(logprobs) == len(token_ids), (len(logprobs), len(token_ids))
        ended = reason == "stop"
        text_ids = self._stops.tokens_of_text(token_ids) if ended else token_ids
        text = self._detokenizer.text(text_ids)
        routed_experts = None
        if self._config.rollout.router_replay:
            routed_experts = experts_of_completion(
                sampled.routed_experts,
                num_tokens=len(running.prompt.token_ids) + len(token_ids) - 1,
                layers=self._shape.expert_layers,
                num_experts=self._shape.experts.number,
            )
        return Completion(
            token_ids=token_ids,
            rollout_logprobs=logprobs,
            text=self._stops.cut(text) if ended else text,
            finish_reason=cast(FinishReason, reason),
            policy_versions=tuple(span.version for span in spans),
            version_starts=tuple(span.first_token for span in spans),
            routed_experts=routed_experts,
        )


def _start_llm(folder: Path, arguments: dict[str, Any]) -> LLM:
    output_processor.LogprobsProcessor = SampledLogprobs  # type: ignore[misc]
    try:
        with raise_worker_errors():
            return LLM(
                model=str(folder),
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
                worker_extension_cls=WORKER_EXTENSION,
                **arguments,
            )
    except ValidationError as error:  # cannot be pickled
        raise ValueError(refusal(folder, error)) from None
