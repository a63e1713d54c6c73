"""Whether an engine samples with the policy's adapter, by log-probs.

Tokens do not say it: vLLM's kernels for adapters add up in no fixed order, and greedy completions
part where two tokens are about as likely.
"""

import ray
from gpu_cases import DEVICE
from greedy_rollouts import PROMPTS
from patience import PATIENCE_S

from rlsys.algo.batching import build_train_batch
from rlsys.types import SampleRequest

BOUND = 2e-2 if DEVICE == "cuda" else 1e-5
"""Mean difference of log-probs that bfloat16 explains, and float32 on CPU."""


def sample(engine):
    """Completions at temperature 1, as a batch."""
    engine.submit([SampleRequest(i, prompt, 4, 1.0, i) for i, prompt in enumerate(PROMPTS)])
    groups = []
    while engine.num_pending:
        ray.wait(engine.pending_refs(), timeout=PATIENCE_S)
        groups += engine.collect()
    return build_train_batch(groups)


def mean_difference(logprobs, batch):
    """Of `logprobs` [rows, tokens] and the engine's own, in nats."""
    gaps = (logprobs - batch.rollout_logprobs).abs() * batch.completion_mask
    return float(gaps.sum() / batch.completion_mask.sum())
