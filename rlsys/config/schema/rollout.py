"""Sampling with vLLM: the section `rollout`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlsys.config.schema.section import NonEmptyText, Section


class RolloutConfig(Section):
    """Sampling with vLLM."""

    num_engines: PositiveInt = 1
    """vLLM engines, each in an actor and process of its own; they share the prompts."""
    engines_per_gpu: PositiveInt = 1
    """Engines that share a GPU. Two sample faster than one where a decode step waits for vLLM's
    Python: models of a few billion parameters with hundreds of sequences. Each has its own
    max_num_seqs. On CPU this only changes how weights are sent."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of one engine."""
    num_generations: int = Field(default=8, ge=2)
    """G, completions per prompt: the group within which rewards are compared; at least 2."""
    generation_batch_size: PositiveInt
    """N, completions sampled per step = prompts * num_generations."""
    max_completion_length: PositiveInt = 256
    """Longest completion, in tokens; a longer one is cut and marked `length`."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs of policy and reference are taken at it too."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: sample among the likeliest tokens with this probability together. The
    policy's log-probs and entropies are over the same tokens."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens, as with top_p; 0 is off."""
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among tokens with at least this share of the likeliest token's probability, as with
    top_p; 0 is off. It comes before top_k and top_p. Evaluations have it, too, and penalties."""
    repetition_penalty: PositiveFloat = 1.0
    """Divide the logits of tokens that prompt or completion already have by this, and multiply
    negative ones; 1 is off. The policy's log-probs have all penalties too, computed from each
    token's own prefix, so ratios stay right for what was sampled. But training then moves penalized
    logits: the model without the penalty repeats more, and final evaluations should sample with
    it."""
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtract this from the logits of tokens that the completion already has; 0 is off. See
    repetition_penalty."""
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    """Subtract this from the logits of tokens once for each time that the completion has them; 0 is
    off. See repetition_penalty."""
    stop: list[NonEmptyText] = []
    """Texts that end a completion, besides the model's EOS tokens: for base models,
    `["\\nQuestion:"]`. Tokens up to the end of the text are trained on. A text that is not a
    special token is searched in decoded text, which slows sampling."""
    stop_token_ids: list[NonNegativeInt] = []
    """Token ids that end a completion in the same way."""
    include_stop_str_in_output: bool = False
    """Leave `stop` and `stop_token_ids` in the text that rewards get, for stops such as
    `</answer>`. EOS tokens are never in it."""
    skip_special_tokens: bool | Literal["auto"] = "auto"
    """Special tokens to leave out of the text that rewards and logs get. auto: those with a role,
    such as EOS, BOS and padding, but not tags such as `<think>`; true: all, as in TRL; false: none.
    The token that ends a completion is never in its text."""
    max_num_seqs: PositiveInt = 256
    """Sequences that an engine decodes at once, at most."""
    kv_cache_memory_mb: PositiveInt | None = None
    """MiB of an engine's KV cache on each of its GPUs; it must hold one sequence of the greatest
    length. null: vLLM sizes it by gpu_memory_utilization. null on CPU, or where engines share a
    GPU: room for max_num_seqs full sequences, but at most 4 GiB, or what gpu_memory_utilization
    leaves each engine."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of its GPU that an engine may take, or that engines_per_gpu engines may take
    together."""
    seed_per_request: bool = True
    """Seed each completion by (seed, place of the prompt in the stream, index): with the same
    weights, completions are the same after a resume and for any number of engines. Costs a little
    Python per sequence and step."""
    max_staleness: NonNegativeInt = 0
    """k, in weight versions: updates that the policy may be ahead of the oldest token it trains on.
    0 is strictly on-policy; above 0, sampling goes on during updates and weight syncs."""
    in_flight_kv: Literal["recompute", "keep"] = "recompute"
    """Keys and values of unfinished completions when weights change: recompute them with the new
    weights, or keep them, which saves time and gives later tokens a context that neither version
    would have computed."""
    router_replay: bool = False
    """For mixtures of experts: the policy sends each token to the experts that vLLM chose for it
    (R3, rollout routing replay), in log-probs and update. Rounding then no longer sends tokens to
    other experts than those that sampled them. Costs top_k bytes (from 257 experts, twice that) for
    each token and layer with experts."""
    oversample_prompts: NonNegativeInt | None = None
    """x: sample P + x prompts and train on the P that finish first. With max_staleness 0 the others
    are given up and sampled again in the next step, so long completions are trained on less often;
    with max_staleness above 0 they go on. null: 0, or k * P with max_staleness k."""
    dynamic_sample: bool = False
    """Replace groups whose rewards are all equal by newly sampled ones (DAPO, arXiv:2503.14476,
    3.2)."""
    max_resample_times: PositiveInt = 3
    """With dynamic_sample: P times this many groups are replaced in a step, at most; then groups
    with equal rewards fill the batch."""
    quantization: Literal["fp8", "fp8_per_block"] | None = None
    """Engines compute linear layers in FP8, on GPUs from compute capability 8.9: half the memory of
    their weights, and faster steps where these decide. Each weight sync sends bfloat16 weights,
    which the engine quantises, with one scale for a matrix (fp8) or for each block of 128 x 128
    (fp8_per_block). The policy stays in bfloat16, so samples are not quite its own:
    grpo.rollout_is = auto corrects that, sampling/logp_difference shows it. null: bfloat16."""
    speculative_config: dict[str, Any] | None = None
    """Speculative decoding on GPUs, in vLLM's words: `{method: ngram, num_speculative_tokens: 4}`
    drafts tokens from the text so far, `{model: PATH, num_speculative_tokens: 3}` with a smaller
    model (method draft_model), whose weights stay as they are. Completions have the same
    distribution, and their exact log-probs; a seed gives other ones. rollout/spec_acceptance_rate
    is the share of drafted tokens that were kept. null: none."""
    engine_kwargs: dict[str, Any] = {}
    """More engine arguments of vLLM, by its names: `{enable_prefix_caching: false}`. Those of the
    installed version are taken as they are, but not what rlsys sets from other fields. The memory
    estimate does not know them, and what makes the engine compute less exactly (kv_cache_dtype)
    shows in sampling/logp_difference."""
    timeout_s: PositiveFloat = 600.0
    """Seconds to wait for the next group of completions before the run fails; time for rewards does
    not count."""
    heartbeat_s: PositiveFloat | None = 30.0
    """Seconds without a sign of life after which an engine is killed, and replaced as the section
    `recovery` says. An engine that computes for long answers; a process that is stopped does not.
    One that replaces another may be silent for ten times as long while it starts. null: off."""

    @property
    def speculation(self) -> dict[str, Any]:
        """speculative_config with its method decided; {} without speculation."""
        given = self.speculative_config or {}
        return {"method": "draft_model"} | given if "model" in given else given

    @property
    def draft_model(self) -> str | None:
        """Folder or hub id of the model that drafts; None without one."""
        drafts = self.speculation
        model = drafts.get("model") if drafts.get("method") == "draft_model" else None
        return model if isinstance(model, str) else None

    @property
    def min_p_and_penalties(self) -> dict[str, float]:
        """By vLLM's names; evaluations have no values of their own for them."""
        return {
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
