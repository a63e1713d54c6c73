"""Sampling and the options of other libraries in words, for `rlsys explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.config.fields import show_value
from rlsys.config.passed_through import MEGATRON
from rlsys.config.pipeline_layout import parse_layout, stage_layers
from rlsys.library_options import options_of

if TYPE_CHECKING:
    from rlsys.config import Config, PolicyConfig, RolloutConfig

_CUTS = {"min_p": 0.0, "top_k": 0, "top_p": 1.0}
_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def describe_sampling(rollout: RolloutConfig) -> list[tuple[str, str]]:
    """(part, description): what completions are sampled from, and what that does to training."""
    cuts, penalties = _set(rollout, _CUTS), _set(rollout, _PENALTIES)
    settings = [f"temperature {rollout.temperature:g}", *cuts, *penalties]
    pairs = [("sampled from", ", ".join(settings)), ("completions end", _end_text(rollout))]
    if cuts:
        pairs.append(
            (
                "left-out tokens",
                "policy and reference leave them out too, each by its own logits: log-probs stay "
                "comparable, except where rounding moves a token over the edge. What is left out "
                "is never sampled and not trained: without the cut the model may still say it",
            )
        )
    if penalties:
        pairs.append(
            (
                "penalties: warning",
                "log-probs of policy and reference have them, from each token's own prefix: ratios "
                "and KL belong to the penalized model. That is the model which is trained: "
                "sampled without the penalties it repeats more, so evaluate it with them",
            )
        )
    if rollout.quantization is not None:
        pairs.append(
            (
                "quantised: warning",
                f"engines compute linear layers in {rollout.quantization}, with weights that each "
                "weight sync quantises, and the policy in bfloat16: samples are not quite its own. "
                "The off-policy correction above weighs tokens by the difference, unless "
                "grpo.rollout_is is none; watch sampling/logp_difference",
            )
        )
    if rollout.speculative_config is not None:
        pairs.append(("drafts", _drafts_text(rollout)))
    return pairs


def _drafts_text(rollout: RolloutConfig) -> str:
    given = rollout.speculation
    number = given.get("num_speculative_tokens")
    drafted = "tokens" if number is None else f"{number} tokens at a time"
    source = "by " + given["method"] if rollout.draft_model is None else f"by {rollout.draft_model}"
    return (
        f"{drafted} {source}; vLLM keeps a draft with the probability that makes completions as "
        "likely as without it, and their log-probs stay exact. rollout/spec_acceptance_rate says "
        "how many are kept: near 0, speculation only costs time"
    )


def _set(rollout: RolloutConfig, neutral: dict[str, float]) -> list[str]:
    """The settings that differ from their neutral values."""
    values = {name: getattr(rollout, name) for name in neutral}
    return [f"{name} {value:g}" for name, value in values.items() if value != neutral[name]]


def _end_text(rollout: RolloutConfig) -> str:
    text = f"at EOS tokens, or cut after {rollout.max_completion_length:,} tokens"
    stops = [*map(repr, rollout.stop), *(f"token {i}" for i in rollout.stop_token_ids)]
    if not stops:
        return text
    kept = "stays in" if rollout.include_stop_str_in_output else "is cut off"
    return (
        f"{text}, or with {show_value(stops)[1:-1]}: all tokens up to there are trained on, and "
        f"the stop {kept} the text that rewards get; such a completion does not count as cut"
    )


_LESS_EXACT = ("quantization_config", "kv_cache_dtype")


def describe_passed_through(config: Config) -> list[tuple[str, str]]:
    """(name = value, where it goes) for each option that vLLM or megatron-core gets."""
    pairs = []
    for name, value in config.rollout.engine_kwargs.items():
        text = "an engine argument of vLLM (rollout.engine_kwargs)"
        if name in _LESS_EXACT:
            text += "; warning: the engine then samples from other numbers than the policy's, see "
            text += "sampling/logp_difference and grpo.rollout_is"
        pairs.append((f"{name} = {show_value(value)}", text))
    return pairs + describe_megatron_kwargs(config.policy, config.has_reference_model)


def describe_megatron_kwargs(
    policy: PolicyConfig, has_reference: bool = False
) -> list[tuple[str, str]]:
    """(name = value, where it goes) for each option that megatron-core gets."""
    pairs = []
    package, sources = MEGATRON
    for name, value in policy.megatron_kwargs.items():
        classes = [c for file, c in sources if name in (options_of(package, ((file, c),)) or {})]
        owners = " and ".join(classes) or "not known here, see the problems below"
        both = {"TransformerConfig", "ModelParallelConfig"} & set(classes)
        of_reference = ", of policy and reference" if both and has_reference else ""
        pairs.append(
            (f"{name} = {show_value(value)}", f"{owners}{of_reference} (policy.megatron_kwargs)")
        )
    return pairs


def describe_pipeline(policy: PolicyConfig) -> list[tuple[str, str]]:
    """What each pipeline rank of the policy has; empty where all have equally many layers."""
    if policy.pipeline_layout is None:
        return []
    stages, pp = parse_layout(policy.pipeline_layout), policy.pipeline_parallel_size
    layers = [
        _stage_text(stage, own) for stage, own in zip(stages, stage_layers(stages), strict=True)
    ]
    pairs = [(f"pipeline rank {rank}", "; then ".join(layers[rank::pp])) for rank in range(pp)]
    if len(stages) > pp:
        text = f"filled up to a multiple of {pp} on each rank, with rows that train nothing"
        pairs.append(("micro-batches", f"{text} (policy.pipeline_layout: interleaved stages)"))
    return pairs


def _stage_text(stage: str, layers: range) -> str:
    parts = ["the embedding"] if "E" in stage else []
    if layers:
        last = f" to {layers[-1]}" if len(layers) > 1 else ""
        parts.append(f"layer{'s' if last else ''} {layers[0]}{last}")
    parts += ["the output"] if "L" in stage else []
    return " and ".join(parts) or "nothing"
