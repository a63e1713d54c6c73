"""Rules of rollout.speculative_config: what would change completions or their log-probs.

With vLLM's rejection sampling every token has the policy's own probability, whoever drafted it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import RolloutConfig

FIELD = "rollout.speculative_config"
METHODS = ("ngram", "ngram_gpu", "suffix", "draft_model")
"""Those that need nothing of the policy's own layers."""


def speculation_problems(rollout: RolloutConfig) -> Iterator[Problem]:
    """Every rule about speculative decoding that `rollout` breaks."""
    if rollout.speculative_config is None:
        return
    yield from _method_problems(rollout)
    if rollout.speculation.get("rejection_sample_method") == "synthetic":
        yield Problem(
            f"{FIELD}: rejection_sample_method = synthetic keeps drafts by a given rate, so that "
            "completions are not the policy's: leave it out"
        )
    if rollout.min_p:
        yield Problem(
            f"{FIELD} cannot be used with rollout.min_p = {rollout.min_p:g}, which vLLM does not "
            "apply to drafts: set min_p to 0 (top_p and top_k work), or leave speculation out"
        )
    if rollout.stop:
        yield Problem(
            f"{FIELD} cannot be used with rollout.stop, because vLLM looks for texts when a whole "
            "draft was added, and tokens behind the text would be trained on: use "
            "rollout.stop_token_ids, or leave speculation out"
        )
    if rollout.router_replay:
        yield Problem(
            f"{FIELD} cannot be used with rollout.router_replay, because vLLM would return "
            "experts of rejected drafts among the completion's: leave one of them out"
        )


def _method_problems(rollout: RolloutConfig) -> Iterator[Problem]:
    method, given = rollout.speculation.get("method"), rollout.speculation
    if method is None:
        yield Problem(
            f"{FIELD} has neither method nor model: write "
            "{method: ngram, num_speculative_tokens: 4}, or the path of a smaller model and "
            "num_speculative_tokens"
        )
    elif method not in METHODS:
        yield Problem(
            f"{FIELD}: method = {method} is not one of {', '.join(METHODS)}. Other methods draft "
            "from the hidden states of one version of the policy, with layers that rlsys neither "
            "trains nor sends: use one of these"
        )
    elif method == "draft_model" and not isinstance(given.get("model"), str):
        yield Problem(f"{FIELD}: method = draft_model needs model, the path of a smaller model")
    elif method != "suffix" and not _is_positive(given.get("num_speculative_tokens")):
        yield Problem(
            f"{FIELD}: num_speculative_tokens = {given.get('num_speculative_tokens')!r} has to be "
            "the number of tokens that are drafted at once, such as 4"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
