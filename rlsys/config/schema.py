"""The nested run configuration: every field with its unit, default and rule.

A config is a YAML file whose sections are the classes below, overridden from the command line as
`--section.field value`. Unknown keys are errors. Derived values are properties, never flags.
"""

from __future__ import annotations

import math
from types import NoneType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rlsys.config.algorithm import (
    COVARIANCE_LOSSES,
    PRESETS,
    Aggregation,
    Level,
    LossSettings,
    RolloutCorrection,
    RolloutRejection,
)
from rlsys.config.field_types import (
    REWARD_MODEL_PREFIX,
    PathText,
    RewardName,
    RewardSettings,
    kinds_of,
    split_list,
)
from rlsys.config.rules import cross_field_problems
from rlsys.problems import ProblemsError


class Section(BaseModel):
    """Base of every section: unknown keys are errors, docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """`none` is null where that is possible, a text a list of one, a boolean no number."""
        assert info.field_name is not None
        kinds = kinds_of(cls.model_fields[info.field_name])
        if NoneType in kinds and value in ("none", "None"):
            return None
        if list in kinds and isinstance(value, str):
            return split_list(value)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("should not be true or false; quote it if it is a text")
        return value


NonEmptyText = Annotated[str, Field(min_length=1)]


class DataConfig(Section):
    """Where prompts come from."""

    dataset: list[PathText] = Field(min_length=1)
    """Training rows: files in JSONL, JSON, CSV, TSV (compressed or not), Parquet or Arrow, folders,
    or ids of the Hugging Face hub, each as `PATH_OR_ID[:SUBSET[:SPLIT]][#ROWS]`, see docs/data.md.
    Relative paths are resolved against the working directory."""
    dataset_weights: list[PositiveFloat] | None = None
    """One per dataset: each prompt comes from a dataset drawn with probability weight / sum of
    weights. None: every row comes once an epoch, whatever dataset it is from."""
    val_dataset: list[PathText] = []
    """Held-out rows, evaluated every `eval_steps`. Empty: `split_dataset_ratio` of `dataset`."""
    split_dataset_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of `dataset` held out for evaluation, instead of `val_dataset`; 0 holds out nothing."""
    max_eval_prompts: PositiveInt = 256
    """Evaluate on the first so many held-out prompts."""
    columns: dict[str, str] = {}
    """New names of columns, `{question: prompt}`, given before anything else looks at a row."""
    preprocessor: list[str] = []
    """Names of `@register_preprocessor` functions: one for all datasets, or one for each of
    `dataset` (`none` leaves rows as they are)."""
    val_preprocessor: list[str] = []
    """The same for `val_dataset`; empty: `preprocessor`, if that is one for all."""
    external_plugins: list[PathText] = []
    """Python files that register preprocessors, datasets or reward functions when imported; the
    same as reward.external_plugins, either option serves all of them."""
    max_prompt_length: PositiveInt = 512
    """Tokens of the rendered prompt; what happens with longer ones, `overlong_prompts` says."""
    min_prompt_length: PositiveInt = 1
    """Tokens of the rendered prompt; shorter prompts are dropped and counted."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """Prompts over `max_prompt_length` are dropped and counted, or refused before training."""
    deduplicate: bool = False
    """Keep only the first of the training rows with the same rendered prompt, and count the
    others."""
    max_row_mb: PositiveInt = 8
    """MiB of one row of a text file; a larger one is an error, as a missing line break makes it."""
    system: str | None = None
    """System message put before rows that have none; None adds nothing."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, `{enable_thinking: false}` for Qwen3. A row's own column
    `chat_template_kwargs` goes before them."""
    shuffle: bool = True
    """Shuffle the training rows anew in every epoch, seeded by `seed`."""
    streaming: bool = False
    """Read and render training rows when they are needed, for data that does not fit in memory.
    Rows are then checked as they come, not before the run."""
    shuffle_buffer_size: PositiveInt = 10_000
    """Rows among which a streamed dataset is shuffled."""
    difficulty_sampling: bool = False
    """Skip prompts whose groups had one and the same reward, so nothing to learn from: solved
    always, or never."""
    difficulty_patience: PositiveInt = 2
    """Such groups in a row after which a prompt is skipped."""
    difficulty_exploration: float = Field(default=0.1, gt=0.0, le=1.0)
    """Probability that a prompt to be skipped is sampled nevertheless; one group with different
    rewards brings it back."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_text_for_a_boolean(cls, variables: dict[str, Any]) -> dict[str, Any]:
        """Templates ask `if enable_thinking`, and the text "no" is not false."""
        for name, value in variables.items():
            if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
                raise ValueError(f"{name}: {value} is a text, write true or false")
        return variables


class ModelConfig(Section):
    """The language model that is trained."""

    path: PathText = Field(min_length=1)
    """Hugging Face model folder or hub id (Llama, Qwen2, Qwen3, Qwen3-MoE)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in policy, reference and rollout engine; auto is bfloat16 on GPUs and
    float32 on CPU, where it makes engines agree to 1e-5."""
    fp32_lm_head: bool = False
    """Compute logits in float32 in policy, reference and rollout engine where `dtype` is bfloat16
    (MiniMax-M1, arXiv:2506.13585; TRL's cast_lm_head_to_fp32): their log-probs agree better. The
    weights that are trained and sent stay in `dtype`. The policy needs vocabulary /
    tensor_parallel_size x hidden size x 4 more bytes, and more time for logits."""


class RolloutConfig(Section):
    """Sampling with vLLM."""

    num_engines: PositiveInt = 1
    """vLLM engines, each an actor and process of its own; prompts are shared among them."""
    engines_per_gpu: PositiveInt = 1
    """Engines that share a GPU. With a model of a few billion parameters and hundreds of sequences
    a decode step waits for vLLM's Python and not for the GPU: two engines then sample faster.
    max_num_seqs is that of each. On CPU it only changes how weights are sent."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of one engine."""
    num_generations: int = Field(default=8, ge=2)
    """G, completions per prompt: the group that advantages are relative to. At least 2."""
    generation_batch_size: PositiveInt
    """N, completions sampled a step = prompts * num_generations."""
    max_completion_length: PositiveInt = 256
    """Tokens; a longer completion is cut there and marked `length`."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs of policy and reference are taken at the same temperature."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling: sample among the likeliest tokens that have this mass together. The
    policy's log-probs and entropies are those of the same distribution, over what is kept."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0 is off. See top_p."""
    stop: list[NonEmptyText] = []
    """Texts that end a completion, besides the EOS tokens of the model's files: for base models,
    `["\\nQuestion:"]`. The tokens up to there are trained on, as EOS is. Texts that are not special
    tokens are looked for in decoded text, which makes sampling slower."""
    stop_token_ids: list[NonNegativeInt] = []
    """Token ids that end a completion, in the same way."""
    include_stop_str_in_output: bool = False
    """Leave what `stop` and `stop_token_ids` name in the text that rewards get, for stops such as
    `</answer>`. EOS tokens are never in it."""
    skip_special_tokens: bool | Literal["auto"] = "auto"
    """Which special tokens are left out of the text that rewards and logs get. auto: those with a
    role, such as EOS, BOS and padding, while tags such as `<think>` stay where a tokenizer has
    them as special tokens; true: all, as in TRL; false: none. The token that ends a completion is
    never in its text."""
    max_num_seqs: PositiveInt = 256
    """Most sequences an engine decodes at once."""
    kv_cache_memory_mb: PositiveInt | None = None
    """MiB of KV cache of an engine, on each of its GPUs, at least one sequence of the greatest
    length; None lets vLLM use gpu_memory_utilization. On CPU, and where engines share a GPU, None
    is room for max_num_seqs full sequences: 4 GiB at most, or what gpu_memory_utilization leaves to
    each."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of its GPU that an engine may take; engines_per_gpu engines take it together."""
    seed_per_request: bool = True
    """Seed every completion by (seed, place of the prompt in the stream, index): the same
    completions after a resume and for any number of engines, as long as they are sampled with the
    same weights. Costs a little Python per sequence and step."""
    max_staleness: NonNegativeInt = 0
    """k, in weight versions: how many updates the policy may be ahead of the oldest token that it
    trains on. 0 is strictly on-policy; above, completions are sampled during updates and go on
    through weight syncs."""
    in_flight_kv: Literal["recompute", "keep"] = "recompute"
    """What happens to the keys and values of unfinished completions when weights change: recompute
    them with the new weights, or keep them, which saves that time and leaves later tokens with
    a context that neither version would have computed."""
    oversample_prompts: NonNegativeInt | None = None
    """x: sample P + x prompts and train on the P that are done first. With max_staleness 0 the
    others are given up and begun again in the next step, so long completions are trained on less
    often; above 0 they go on. None: 0, or with max_staleness k as many as that allows, k * P."""
    dynamic_sample: bool = False
    """Replace groups whose rewards are all equal by newly sampled ones (DAPO, arXiv:2503.14476,
    3.2)."""
    max_resample_times: PositiveInt = 3
    """With dynamic_sample: replace at most so many times P groups a step; then groups without
    variance fill the batch."""
    timeout_s: PositiveFloat = 600.0
    """Longest wait, in seconds, for the next group of completions before the run fails and says so;
    time in which rewards are computed does not count."""


class RewardConfig(Section):
    """What completions are scored by."""

    reward_funcs: list[RewardName] = []
    """Registered names, see `rlsys rewards list`."""
    reward_model: list[PathText] = []
    """Folders or hub ids of sequence-classification models (ms-swift: --reward_model). Each is
    one more reward function, called reward_model:PATH, in a process of its own; settings in
    reward_params stand under that name, or under reward_model for all of them."""
    reward_model_placement: Literal["policy", "own"] = "policy"
    """On GPUs. policy: on those of the policy's ranks, which wait while completions are sampled and
    scored; the model's weights stay there, so leave room for them. own: a GPU for each model."""
    reward_weights: list[float] | None = None
    """One per reward function, then one per reward model; None is 1 for each."""
    reward_params: dict[RewardName, RewardSettings] = {}
    """Settings of reward functions by name, `{length: {max_length: 100}}`: keyword arguments that
    a class is instantiated with, or a function is called with. Parameters that are called
    max_completion_length or model_path and not given here get the run's own."""
    external_plugins: list[PathText] = []
    """Python files that register reward functions, preprocessors or datasets when imported; the
    same as data.external_plugins, either option serves all of them."""
    gate: dict[RewardName, RewardName] = {}
    """Functions that count only where another one is high enough: `{accuracy: format}` or
    `{accuracy: format >= 0.5}`; without a number it is 1. Where the gate is lower, the function is
    not called and its value is 0. A gate may not be gated itself."""
    num_workers: PositiveInt = 1
    """Reward processes; groups are scored while others are still being sampled. Async functions
    share one more process."""
    timeout_s: PositiveFloat = 60.0
    """Longest time, in seconds, that one reward function may take for one group; then its process
    is killed, and each completion is tried alone with an equal share, at least a second, to find
    the one that hangs."""
    max_memory_mb: PositiveInt | None = None
    """MiB that a reward process and what it started may hold before they are killed; None is a
    quarter of the machine's memory."""
    on_error: Literal["raise", "zero", "drop"] = "raise"
    """When a reward function raises or returns what is no reward: end the run with its traceback,
    score that completion 0, or drop it, so that it takes no part in the update."""
    on_timeout: Literal["raise", "zero", "drop"] | None = None
    """When a reward function hangs, crashes or needs too much memory, for the completion that makes
    it; None is on_error if that is zero or drop, and otherwise zero: the run goes on."""

    @property
    def names(self) -> list[str]:
        """All reward functions, in the order of their weights."""
        return self.reward_funcs + [REWARD_MODEL_PREFIX + path for path in self.reward_model]

    @property
    def names_that_check_rows(self) -> list[str]:
        """Those of `names` that may refuse rows before the run.

        Not those behind a gate, which may never be called for such a row; and none in a run that
        takes 0 for what fails, or drops it: it has said what it does with such rows.
        """
        if self.on_error != "raise":
            return []
        return [name for name in self.names if name not in self.gate]

    @property
    def models(self) -> list[str]:
        """Those of `names` that are reward models."""
        prefix = REWARD_MODEL_PREFIX
        return [name for name in self.names if f"{name}:" == prefix or name.startswith(prefix)]

    @property
    def model_paths(self) -> list[str]:
        """Folders or hub ids of `models`, where they are given."""
        return [
            self.params[name]["path"] for name in self.models if "path" in self.params.get(name, {})
        ]

    @property
    def params(self) -> dict[str, dict[str, Any]]:
        """`reward_params` by name, those of reward models completed."""
        shared = self.reward_params.get(REWARD_MODEL_PREFIX[:-1], {})
        completed = {}
        for name in self.models:
            path = name.removeprefix(REWARD_MODEL_PREFIX)
            own = {"path": path} if path != name else {}
            completed[name] = shared | own | self.reward_params.get(name, {})
        return self.reward_params | completed


class GrpoConfig(Section):
    """The algorithm: Group Relative Policy Optimization (arXiv:2402.03300)."""

    beta: NonNegativeFloat = 0.0
    """Weight of the KL to the reference model; 0 builds no reference model."""
    epsilon: PositiveFloat = 0.2
    """Clip range of the ratio: [1 - epsilon_low, 1 + epsilon_high], both epsilon unless set. Of its
    log with gmpo: [-epsilon_low, epsilon_high]. With dppo_tv and dppo_kl the greatest divergence of
    a token's probability: epsilon_high upwards, epsilon_low downwards."""
    epsilon_low: PositiveFloat | None = None
    """Lower clip range (verl's clip_ratio_low); None is epsilon, and no lower bound for cispo."""
    epsilon_high: PositiveFloat | None = None
    """Upper clip range (DAPO's clip-higher); None is epsilon."""
    delta: PositiveFloat | None = None
    """Upper bound of the ratio where the advantage is negative, above 1 + epsilon_high: TRL's
    delta and the constant c of dual-clip PPO. None is no bound, and 3 for loss_type dual_clip. With
    dppo_tv and dppo_kl of every ratio; None is 20."""
    num_iterations: PositiveInt = 1
    """Passes over one rollout (mu in the paper)."""
    max_logp_difference: PositiveFloat | None = 1.0
    """End the run where log-probs of policy and rollout engine differ by more than this, in nats a
    token on average, for the same weights; a warning comes as soon as rounding does not explain the
    difference. With rollout.max_staleness only the first step is looked at. None never ends it."""
    advantage_estimator: str = "grpo"
    """What a completion is compared with: grpo (mean of its group), rloo (mean of the others of its
    group), reinforce_plus_plus (mean of the batch), reinforce_plus_plus_baseline (mean of its
    group, scaled by the batch), maxrl (mean of its group, divided by that mean)."""
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    """Divide advantages by the std of rewards within the group, within the batch, or not at all;
    auto is what the estimator's paper does: group for grpo, none for rloo."""
    advantage_eps: PositiveFloat = 1e-4
    """Added to that std, in reward units."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Sum the reward functions, then compare; or compare each by itself, then sum (GDPO)."""
    mask_truncated_completions: bool = False
    """Do not train on completions cut at max_completion_length (DAPO's overlong filtering); they
    still count in the advantages of their group."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimate of the KL to the reference model; None is k3 in the loss and k1 in the reward."""
    kl_in_reward: bool = False
    """Subtract beta * KL from the rewards instead of adding it to the loss."""
    use_bias_correction_kl: bool = False
    """Multiply the KL in the loss by policy / sampler: then its gradient is unbiased, for stale
    data too if `rollout_is` corrects for it (DeepSeek-V3.2)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus, averaged over tokens as the loss is; 0 is none."""
    top_entropy_quantile: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens, those of highest entropy, that get a policy gradient;
    1 is all. Below 1 costs a forward pass."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Where the ratio starts from. auto: the trainer's log-probs before the update, computed only
    when they differ from those of the update itself. recompute: always computed. rollout: the
    rollout engine's, which saves a forward pass and clips against what was sampled."""
    rollout_is: RolloutCorrection = "auto"
    """Multiply the policy loss by old_logprobs / rollout_logprobs as probabilities: of the token,
    of the whole completion, or its geometric mean over the completion's tokens. Weights out of
    bounds are truncated, or with token_mask and sequence_mask 0: TRL's
    vllm_importance_sampling_mode. auto: token when rollouts may be stale, else none."""
    rollout_is_threshold: PositiveFloat = 2.0
    """Upper bound of these weights (TRL's vllm_importance_sampling_clip_max)."""
    rollout_is_threshold_lower: PositiveFloat | None = None
    """Lower bound of these weights (TRL's vllm_importance_sampling_clip_min); None is no bound."""
    rollout_rs: RolloutRejection = "none"
    """Leave out what is out of bounds: the tokens (IcePop) or the completions by their weight
    (token, sequence, geometric), or by k2 or k3 of the log of the weights: of the token, or the
    sum, mean or maximum over the completion (verl)."""
    rollout_rs_threshold: PositiveFloat | None = None
    """Upper bound of what is kept: a weight of at least 1, None is 2; or for k2 and k3 a
    divergence, which has no default."""
    rollout_rs_threshold_lower: float | None = Field(default=None, ge=0.0, le=1.0)
    """Lower bound of the weights that are kept; None is 1 / rollout_rs_threshold, 0 is no bound.
    Divergences have none."""
    rollout_token_veto_threshold: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Leave out a completion if the weight of one of its tokens is below this, such as 1e-4: the
    engine sampled what the policy would hardly ever say. None leaves out none."""
    rollout_token_veto_threshold_high: float | None = Field(default=None, gt=1.0)
    """The same for tokens whose weight is above this, such as 100 (SkyRL's outlier token mask)."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Leave out completions of negative advantage whose log-probs fell by more than this, in nats a
    token, since they were sampled (DeepSeek-V3.2). None leaves out none."""
    external_plugins: list[PathText] = []
    """Python files that register more losses or advantage estimators when imported."""
    loss_type: str = "grpo"
    """The policy's loss: grpo, bnpo, dapo, dr_grpo, dual_clip, gspo, luspo, cispo, sapo, vespo,
    gmpo, dppo_tv, dppo_kl, clip_cov, kl_cov, reinforce; see docs/algorithm.md."""
    loss_aggregation: Aggregation | None = None
    """How token losses are averaged over an optimizer step of M completions. token_mean: over all
    tokens. seq_mean_token_mean: token means of each completion, over M. seq_mean_token_sum: sum /
    M. seq_mean_token_sum_norm: sum / (M * max_completion_length). None is that of the loss's
    paper."""
    importance_sampling_level: Level | None = None
    """What the clipped losses, cispo and sapo take the ratio of: each token, the sequence (GSPO),
    or the sequence with each token's gradient (GSPO-token). None is sequence for gspo and luspo,
    else token."""
    sapo_temperature_pos: PositiveFloat = 1.0
    """Steepness of sapo's gate for positive advantages."""
    sapo_temperature_neg: PositiveFloat = 1.05
    """Steepness of sapo's gate for the others."""
    vespo_k_pos: NonNegativeFloat = 2.0
    """Power of the sequence's ratio in vespo's weight, for advantages of 0 and more: the larger,
    the less counts a completion that became unlikely."""
    vespo_lambda_pos: PositiveFloat = 3.0
    """Decay of vespo's weight, for advantages of 0 and more: the larger, the less counts a
    completion that became likely."""
    vespo_k_neg: NonNegativeFloat = 3.0
    """The power for negative advantages."""
    vespo_lambda_neg: PositiveFloat = 2.0
    """The decay for negative advantages."""
    clip_cov_ratio: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that clip_cov leaves out, at least one: drawn from those
    whose covariance of log-prob and advantage is between clip_cov_lb and clip_cov_ub."""
    clip_cov_lb: float = 1.0
    """Covariance above which clip_cov may leave a token out."""
    clip_cov_ub: float = 5.0
    """Covariance below which clip_cov may leave a token out."""
    kl_cov_ratio: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that kl_cov penalizes, at least one: those of the highest
    covariance of log-prob and advantage."""
    ppo_kl_coef: NonNegativeFloat = 1.0
    """Weight of kl_cov's penalty, the absolute log ratio of policy and old policy."""

    @property
    def corrects_rollouts(self) -> bool:
        """Whether `rollout_is` weighs tokens."""
        return self.rollout_is not in ("auto", "none")

    @property
    def rejects_rollouts(self) -> bool:
        """Whether the difference between policy and rollout engine may leave tokens out."""
        vetoes = (self.rollout_token_veto_threshold, self.rollout_token_veto_threshold_high)
        return self.rollout_rs != "none" or vetoes != (None, None)

    @property
    def rollout_rs_bounds(self) -> tuple[float, float]:
        """Least and greatest weight or divergence that `rollout_rs` keeps."""
        upper = 2.0 if self.rollout_rs_threshold is None else self.rollout_rs_threshold
        if self.rollout_rs not in ("token", "sequence", "geometric"):
            return 0.0, upper
        lower = self.rollout_rs_threshold_lower
        return 1 / upper if lower is None else lower, upper

    @property
    def epsilons(self) -> tuple[float, float]:
        """epsilon_low and epsilon_high, decided."""
        low, high = self.epsilon_low, self.epsilon_high
        return self.epsilon if low is None else low, self.epsilon if high is None else high

    @property
    def clip_range(self) -> tuple[float, float]:
        """Least and greatest ratio that is not clipped."""
        low, high = self.epsilons
        return 1 - low, 1 + high

    @property
    def loss_settings(self) -> LossSettings:
        """The preset of `loss_type`, with the fields that are set in place of its own."""
        preset = PRESETS.get(self.loss_type, PRESETS["grpo"])
        return LossSettings(
            self.loss_aggregation or preset.loss_aggregation,
            self.importance_sampling_level or preset.importance_sampling_level,
            self.delta or preset.delta,
        )


class PolicyConfig(Section):
    """The megatron-core trainer."""

    world_size: PositiveInt = 1
    """Ranks, each an actor and process of its own (a GPU each on GPUs)."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer; above 1, sequence parallelism is on."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the layers among them."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of each layer, in a mixture of experts, and exchange tokens for
    it: tensor-parallel ranks first, then context-parallel, then data-parallel ones. Must be above 1
    where tensor_parallel_size is."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each sequence, for completions whose activations do not fit on
    one GPU. Sequences are filled up to a multiple of twice this."""
    global_batch_size: PositiveInt | None = None
    """Completions an optimizer step; None is generation_batch_size, one step a rollout."""
    micro_batch_size: PositiveInt = 8
    """Completions a forward pass of a data-parallel rank."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Tokens a forward pass of a data-parallel rank; when set, it decides instead of
    micro_batch_size."""
    lr: NonNegativeFloat = 1e-6
    """Peak learning rate of AdamW; 0 trains nothing, see `rlsys doctor --canary`."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Decay from `lr` to `min_lr` over the optimizer steps after warm-up."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    warmup_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of all optimizer steps in which the learning rate rises linearly from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay; biases and norms are exempt."""
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    """Decay of AdamW's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """Clip the global gradient norm to this."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool | None = None
    """Sum gradients over data-parallel ranks while the backward pass of the last micro-batch goes
    on. None: on GPUs, where there are several such ranks."""
    overlap_param_gather: bool | None = None
    """With use_distributed_optimizer: after an optimizer step, gather each part of the weights when
    the next forward pass needs it. After the last step of a rollout all are gathered at once, for
    the weight sync. None: where overlap_grad_reduce is on and a rollout has several optimizer
    steps."""
    attention_backend: Literal["auto", "fused", "flash", "unfused"] = "auto"
    """Attention kernels on GPUs, as Transformer Engine calls them: fused is cuDNN's, flash needs
    flash-attn, flash-attn-3 or flash-attn-4, unfused is plain matrix products, slow and large. auto
    lets Transformer Engine choose; the CPU has one kind only."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them. selective: those
    of recompute_modules, in every layer. full: everything but each layer's input, for a third more
    time."""
    recompute_modules: list[Literal["core_attn", "mlp"]] = Field(default=["mlp"], min_length=1)
    """What recompute: selective computes again: mlp, about two thirds of a layer's activations for
    a quarter more time, or core_attn, which saves little where attention is fused."""
    recompute_logits: bool = True
    """Compute logits again in the backward pass; false keeps those of a micro-batch, tokens x
    vocabulary / tensor_parallel_size numbers, and saves a few percent of the time."""
    cpu_threads: PositiveInt = 1
    """Threads of each rank on CPU."""
    timeout_s: PositiveFloat = 1800.0
    """Longest time, in seconds, that one phase of the policy may take."""


class ReferenceConfig(Section):
    """The frozen model of the KL term; exists only when grpo.beta > 0."""

    path: PathText | None = Field(default=None, min_length=1)
    """Hugging Face model folder or hub id; None is model.path."""
    world_size: PositiveInt = 1
    """Ranks; they hold replicas except for tensor_parallel_size."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each sequence."""
    sync_steps: PositiveInt | None = None
    """Take the policy's weights every so many steps (TRL's ref_model_sync_steps); None keeps the
    reference as it is."""
    mixup_alpha: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the policy's weights in the mix that then replaces the reference's (TR-DPO,
    arXiv:2404.09656; TRL's ref_model_mixup_alpha); 1 is a copy."""
    placement: Literal["policy", "own"] = "policy"
    """On GPUs. policy: rank r runs on the GPU of policy rank r, and its weights wait in host memory
    while it does not. own: GPUs of its own, which saves that copy."""


class WeightSyncConfig(Section):
    """How the rollout engines get the policy's weights after every update."""

    transport: Literal["auto", "gloo", "nccl"] = "auto"
    """auto: NCCL between GPUs, gloo on CPU."""
    bucket_mb: PositiveInt = 256
    """MiB sent at once. Both sides keep two such buffers; the largest tensor, most often the
    embedding, sets their size if it is larger. Between two H200s more is not faster, and 64 takes
    twice as long."""
    in_place: bool = True
    """Copy straight into the rollout engine's own parameters where they can be mapped, which the
    first update proves; false goes through vLLM's own loader every time. CPU engines keep weights
    packed and always do."""
    verify: bool = True
    """Compare a checksum of every bucket on both sides."""
    timeout_s: PositiveFloat = 120.0
    """Longest time, in seconds, that one phase of a weight sync may take."""


class TrackingConfig(Section):
    """Where metrics and completions go, besides metrics.jsonl and completions.jsonl."""

    report_to: list[str] = ["tensorboard"]
    """More trackers by name: tensorboard, wandb (which needs `pip install wandb`); none or
    [] for no more."""
    run_name: PathText | None = None
    """Name of the run in trackers; None is the name of output_dir."""
    wandb_project: PathText = "rlsys"
    """Project of the run in wandb."""
    log_completions: bool = True
    """Append every completion to completions.jsonl when its group gets its place in a batch."""

    @field_validator("report_to")
    @classmethod
    def _none_is_none(cls, names: list[str]) -> list[str]:
        return [] if names == ["none"] else names


AUTO_SAVES = 20
"""A run that is killed loses 1/20 of its steps at most."""


class CheckpointConfig(Section):
    """What is kept to continue from. Every checkpoint, OUTPUT_DIR/checkpoints/step-N, is a model
    folder that transformers and vLLM load, and holds the optimizer's state besides. The final model
    is always written to OUTPUT_DIR/final."""

    save_steps: PositiveInt | Literal["auto"] | None = "auto"
    """Write a checkpoint every so many steps, and after the last one. auto: every 5% of max_steps,
    less often where saving would take more than a tenth of the time. null: never."""
    save_total_limit: PositiveInt = 2
    """Keep the newest so many checkpoints. While one is written there is one more."""
    exit_timeout_s: PositiveFloat = 600.0
    """Seconds that a run may take, after Ctrl-C, SIGTERM or a failure, to save the last finished
    step: its weights in OUTPUT_DIR/interrupted, then a checkpoint unless save_steps is null. A
    second Ctrl-C ends it at once."""
    resume: bool = False
    """Continue the run in output_dir from its newest checkpoint."""

    def interval(self, max_steps: int) -> int | None:
        """Steps between two checkpoints; None writes none."""
        if self.save_steps == "auto":
            return max(1, max_steps // AUTO_SAVES)
        return self.save_steps


class Config(Section):
    """One GRPO run."""

    output_dir: PathText = Field(min_length=1)
    """Everything a run writes. If it holds another run, checkpoint.resume or overwrite decides."""
    overwrite: bool = False
    """Start from step 0 in an output_dir that holds another run, whose files are moved to
    OUTPUT_DIR/replaced-1 (then replaced-2, ...). With checkpoint.resume: only where there is no
    checkpoint to continue from, so that a job that is started again and again needs both."""
    max_steps: PositiveInt | None = None
    """Rollouts, each followed by one policy update and one weight sync. None: num_train_epochs
    decides; one of the two must be set, and max_steps goes first."""
    num_train_epochs: PositiveFloat | None = None
    """Passes over the training prompts: max_steps = num_train_epochs x prompts / prompts a step,
    rounded up, once the data is loaded. Needs data in memory, so not data.streaming. What
    rollout.dynamic_sample draws again is not counted."""
    eval_steps: PositiveInt | None = None
    """Evaluate on held-out prompts before the first and after every so many steps; None: never."""
    seed: int = Field(default=42, ge=0, lt=2**31)
    """Seeds data order, sampling and mini-batches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What every role of the run computes on. auto: GPUs when this machine or the Ray cluster has
    any. cpu leaves the GPUs of a host alone."""
    placement_timeout: PositiveFloat | Literal["wait"] | None = 60.0
    """Seconds to wait for GPUs of the Ray cluster that other runs are using (on CPU, for CPUs),
    before this run fails. wait or None: until they are free. A line every half minute says what is
    missing."""
    data: DataConfig
    model: ModelConfig
    rollout: RolloutConfig
    reward: RewardConfig
    grpo: GrpoConfig = GrpoConfig()
    policy: PolicyConfig = PolicyConfig()
    reference: ReferenceConfig = ReferenceConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        problems = cross_field_problems(self)
        if problems:
            raise ProblemsError("the config", problems)
        return self

    @property
    def num_steps(self) -> int:
        """Steps of the run, of a config `with_steps`."""
        assert self.max_steps is not None, "num_train_epochs needs the number of prompts"
        return self.max_steps

    def steps_of_epochs(self, num_rows: int) -> int | None:
        """What max_steps has to be for num_train_epochs passes over so many training prompts."""
        if self.num_train_epochs is None:
            return None
        return max(1, math.ceil(round(self.num_train_epochs * num_rows / self.num_prompts, 9)))

    def with_steps(self, num_rows: int) -> Config:
        """This config with max_steps decided for so many training prompts."""
        if self.max_steps is not None:
            return self
        return self.model_copy(update={"max_steps": self.steps_of_epochs(num_rows)})

    @property
    def num_prompts(self) -> int:
        """P, prompts a step."""
        return self.rollout.generation_batch_size // self.rollout.num_generations

    @property
    def num_prompts_ahead(self) -> int:
        """x, prompts that are sampled beyond those of the batch that is waited for."""
        if self.rollout.oversample_prompts is not None:
            return self.rollout.oversample_prompts
        return self.rollout.max_staleness * self.num_prompts

    @property
    def global_batch_size(self) -> int:
        """Completions an optimizer step."""
        return self.policy.global_batch_size or self.rollout.generation_batch_size

    @property
    def optimizer_steps_per_rollout(self) -> int:
        """Optimizer steps between two weight syncs."""
        per_pass = self.rollout.generation_batch_size // self.global_batch_size
        return per_pass * self.grpo.num_iterations

    @property
    def recompute_old_logprobs(self) -> bool:
        """Whether the policy's log-probs before the update are computed on their own.

        They must be when the policy moves within one rollout, so that the ratio needs a fixed
        start; when the KL is part of the reward; and when entropies or covariances choose tokens.
        """
        grpo = self.grpo
        if grpo.old_logprobs == "auto":
            needed = (grpo.kl_in_reward and grpo.beta > 0) or grpo.top_entropy_quantile < 1
            needed = needed or grpo.loss_type in COVARIANCE_LOSSES
            return needed or self.optimizer_steps_per_rollout > 1
        return grpo.old_logprobs == "recompute"

    @property
    def algorithm(self) -> GrpoConfig:
        """`grpo` with what depends on other sections decided."""
        rollout_is = self.grpo.rollout_is
        if rollout_is == "auto":
            rollout_is = "token" if self.rollout.max_staleness else "none"
        return self.grpo.model_copy(update={"rollout_is": rollout_is})

    def overlaps_grad_reduce(self, *, on_cpu: bool) -> bool:
        """policy.overlap_grad_reduce, decided."""
        if self.policy.overlap_grad_reduce is None:
            return not on_cpu and self.data_parallel_size > 1
        return self.policy.overlap_grad_reduce

    def overlaps_param_gather(self, *, on_cpu: bool) -> bool:
        """policy.overlap_param_gather, decided."""
        if self.policy.overlap_param_gather is None:
            return (
                self.policy.use_distributed_optimizer
                and self.optimizer_steps_per_rollout > 1
                and self.overlaps_grad_reduce(on_cpu=on_cpu)
            )
        return self.policy.overlap_param_gather

    def model_dtype(self, *, on_cpu: bool) -> Literal["float32", "bfloat16"]:
        """The weights' type on the device of the run."""
        if self.model.dtype == "auto":
            return "float32" if on_cpu else "bfloat16"
        return self.model.dtype

    @property
    def known_to_rewards(self) -> dict[str, Any]:
        """What reward parameters of these names get when reward.reward_params leaves them out."""
        return {
            "max_completion_length": self.rollout.max_completion_length,
            "model_path": self.model.path,
        }

    @property
    def largest_context_parallel_size(self) -> int:
        """Of the policy and, if there is one, the reference."""
        of_reference = self.reference.context_parallel_size if self.grpo.beta > 0 else 1
        return max(self.policy.context_parallel_size, of_reference)

    @property
    def policy_shares_gpus(self) -> bool:
        """Whether the reference or reward models compute on the policy's GPUs while it waits."""
        return (self.grpo.beta > 0 and self.reference.placement == "policy") or (
            bool(self.reward.models) and self.reward.reward_model_placement == "policy"
        )

    @property
    def reference_path(self) -> str:
        """Model folder or hub id of the reference."""
        return self.reference.path or self.model.path

    def refreshes_reference(self, step: int) -> bool:
        """Whether the reference takes the policy's weights after `step`."""
        return self.reference.sync_steps is not None and step % self.reference.sync_steps == 0

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the policy."""
        policy = self.policy
        return policy.world_size // (
            policy.tensor_parallel_size
            * policy.pipeline_parallel_size
            * policy.context_parallel_size
        )
