"""The experts that vLLM chose for each token, as it returns them with a completion.

vLLM (0.26 to 0.32) captures the choices of its routers with `enable_return_routed_experts`, and
returns them as `CompletionOutput.routed_experts` [tokens, layers, top_k]. Each token is routed once
for every forward pass that reads it. What comes back is the routing of the pass that sampled the
next token: also where a prompt's keys and values were cached, where a sequence was preempted and
computed again, and where weights changed in flight. The last token of a completion was never read,
so it has no routing.

On GPUs this needs nothing more. On CPU vLLM 0.32 captures only with its second model runner, which
needs Triton; `connect_cpu_runner` connects the first one to the same capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

OPTION = "enable_return_routed_experts"
"""vLLM's engine argument."""


def check_captures_experts() -> None:
    """Raise ValueError if this vLLM cannot say which experts it chose."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if not hasattr(EngineArgs, OPTION):
        raise ValueError(
            f"rollout.router_replay: vLLM {vllm.__version__} does not return the experts that it "
            "chose; install vLLM 0.26 or newer, or set rollout.router_replay to false"
        )


def experts_of_completion(
    routed: np.ndarray | None, *, num_tokens: int, layers: Sequence[int], num_experts: int
) -> np.ndarray:
    """vLLM's choices for one completion and its prompt, in the layers that have experts.

    Args:
        routed: `CompletionOutput.routed_experts`, [tokens, layers of the model, top_k].
        num_tokens: tokens that vLLM read: prompt and completion without its last token.
        layers: the layers that have experts.
        num_experts: experts of such a layer.

    Returns:
        [num_tokens, layers with experts, top_k], uint8 up to 256 experts, else int16.

    Raises:
        RuntimeError: choices are missing, or cannot be choices.
    """
    advice = "set rollout.router_replay to false, or report this with the model and vLLM's version"
    if routed is None or len(routed) != num_tokens:
        found = "none" if routed is None else f"those of {len(routed)}"
        raise RuntimeError(
            f"rollout.router_replay needs the experts of {num_tokens} tokens that vLLM read, and "
            f"vLLM returned {found}: {advice}"
        )
    dtype = np.uint8 if num_experts <= 256 else np.int16
    chosen = np.ascontiguousarray(routed[:, list(layers)], dtype=dtype)  # as Ray shares arrays
    # A kernel that vLLM does not capture leaves zeros, in every token. A token never goes to the
    # same expert twice, so a few tokens show it.
    some = np.sort(chosen[:: max(1, num_tokens // 4)], axis=-1)
    if (some[..., 1:] == some[..., :-1]).any() or some.max() >= num_experts:
        raise RuntimeError(
            "rollout.router_replay: vLLM returned the same expert twice for one token, or one that "
            f"the model does not have, so its kernel for experts does not report them: {advice}"
        )
    return chosen


def connect_cpu_runner() -> None:
    """Connect vLLM's first model runner on CPU to its capture of routed experts.

    In vLLM 0.32 only the second model runner is connected, and that one needs Triton. Scheduler,
    capture and output are vLLM's own; what its runner does at three moments of a step is added to
    the other runner. Call it in every process that runs a part of an engine.
    """
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not hasattr(VllmConfig, "_verify_aux_output_compatibility"):
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if hasattr(CPUModelRunner, "rlsys_experts"):
        return
    CPUModelRunner.rlsys_experts = None  # type: ignore[attr-defined]
    check, start = VllmConfig._verify_aux_output_compatibility, CPUModelRunner.initialize_kv_cache
    execute, sample = CPUModelRunner.execute_model, CPUModelRunner.sample_tokens

    def check_without_runner(config: Any) -> None:
        with mock.patch.object(VllmConfig, "use_v2_model_runner", True):
            check(config)

    def initialize_kv_cache(
        runner: Any, kv_cache_config: Any, is_profiling: bool = False, **options: Any
    ) -> None:
        start(runner, kv_cache_config, is_profiling, **options)
        if runner.vllm_config.aux_output_config.enabled and not is_profiling:
            from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

            runner.rlsys_experts = get_aux_output_connector(
                runner.model, runner.vllm_config, kv_cache_config
            )

    def execute_model(runner: Any, scheduled: Any, *args: Any) -> Any:
        if runner.rlsys_experts is None:
            return execute(runner, scheduled, *args)
        runner.rlsys_experts.begin_step(scheduled.aux_output_connector_metadata)
        output = execute(runner, scheduled, *args)
        if output is None:  # tokens are sampled by a second call
            runner.rlsys_pending = _copy_of_step(runner, scheduled)
        return output

    def sample_tokens(runner: Any, *args: Any) -> Any:
        output = sample(runner, *args)
        if runner.rlsys_experts is None:
            return output
        pending, runner.rlsys_pending = runner.rlsys_pending, None
        if pending is not None:
            _attach(output, pending)
        return output

    VllmConfig._verify_aux_output_compatibility = check_without_runner  # type: ignore[method-assign]
    CPUModelRunner.initialize_kv_cache = initialize_kv_cache  # type: ignore[method-assign]
    CPUModelRunner.execute_model = execute_model  # type: ignore[method-assign]
    CPUModelRunner.sample_tokens = sample_tokens  # type: ignore[method-assign]


def _copy_of_step(runner: Any, scheduled: Any) -> Any:
    """The step's choices; None on a worker that returns nothing to the engine."""
    batch = runner.input_batch
    num_requests = batch.num_reqs
    counts = [scheduled.num_scheduled_tokens[request] for request in batch.req_ids]
    pending = runner.rlsys_experts.prepare_output(
        SimpleNamespace(
            req_ids=batch.req_ids,
            query_start_loc_np=np.cumsum([0, *counts]),
            num_computed_tokens_np=batch.num_computed_tokens_cpu[:num_requests].copy(),
        )
    )
    if pending is not None:
        # A request whose prompt is not read to its end samples nothing.
        sampled = ~runner.discard_request_mask.np[:num_requests]
        pending.enqueue_cpu_copy(sampled.astype(np.int64), np.zeros(num_requests, np.int64))
    return pending


def _attach(output: Any, pending: Any) -> None:
    """Add the choices to the step's output, once the engine asks for it."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    if not isinstance(output, AsyncModelRunnerOutput):
        output.aux_output_connector_output = pending.process_output()
        return
    get_output = output.get_output

    def with_experts() -> Any:
        finished = get_output()
        finished.aux_output_connector_output = pending.process_output()
        return finished

    output.get_output = with_experts  # type: ignore[method-assign]
