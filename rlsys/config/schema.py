"""The nested run configuration: every field with its unit, default and rule.

A config is a YAML file whose sections are the classes below, overridden from the command line as
`--section.field value`. Unknown keys are errors. Derived values are properties, never flags.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
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
from rlsys.config.dataset_spec import Hub, dataset_of_modelscope, model_of_modelscope
from rlsys.config.field_types import (
    REWARD_MODEL_PREFIX,
    PathText,
    Regex,
    RewardName,
    RewardSettings,
    check_regex,
    kinds_of,
    parse_ports,
    split_list,
)
from rlsys.config.gates import Gate, parse_gate
from rlsys.config.pipeline_layout import parse_layout
from rlsys.config.prompt_template import template_columns
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
        """Read `none` as null and `a,b` as a list, where the field takes null or a list.

        Raises:
            ValueError: the value is a boolean, and the field does not take one.
        """
        assert info.field_name is not None
        kinds = kinds_of(cls.model_fields[info.field_name])
        if NoneType in kinds and value in ("none", "None"):
            return None
        if list in kinds and str not in kinds and isinstance(value, str):
            return split_list(value)
        if isinstance(value, bool) and bool not in kinds:
            raise ValueError("should not be true or false; quote it if it is a text")
        return value

    def shown(self, name: str) -> str:
        """The value of a field for an error: users look in vain for one that they did not write."""
        default = "" if name in self.model_fields_set else " (the default)"
        return f"{getattr(self, name)}{default}"


NonEmptyText = Annotated[str, Field(min_length=1)]


class RowsConfig(Section):
    """Where rows come from, and how they are read: what `data` has for every method."""

    dataset: list[PathText] = Field(min_length=1)
    """Training rows: files (JSONL, JSON, CSV, TSV, each also compressed, Parquet, Arrow), folders
    or hub ids, written `PATH_OR_ID[:SUBSET[:SPLIT]][#ROWS]`, see docs/data.md. Relative paths start
    at the working directory."""
    dataset_weights: list[PositiveFloat] | None = None
    """One weight per dataset: each prompt or sample comes from a dataset drawn with probability
    weight / sum of weights. null: every row of every dataset comes once an epoch."""
    val_dataset: list[PathText] = []
    """Held-out rows, evaluated every `eval_steps`. Empty: `split_dataset_ratio` of `dataset`."""
    val_sets: dict[str, list[PathText]] = {}
    """Further held-out sets by name, `{math500: math500.jsonl, aime: [a.jsonl, b.jsonl]}`: each is
    evaluated on its own, as eval/NAME/..."""
    split_dataset_ratio: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of `dataset` held out for evaluation, instead of `val_dataset`; 0 holds out nothing."""
    columns: dict[str, str] = {}
    """New names of columns, `{question: prompt}`, given before anything else reads a row."""
    preprocessor: list[str] = []
    """Names of `@register_preprocessor` functions: one for all datasets, or one for each of
    `dataset` (`none` leaves rows as they are)."""
    val_preprocessor: list[str] = []
    """The same for `val_dataset`. Empty: `preprocessor`, if it names one for all. `val_sets` take
    one name for all."""
    external_plugins: list[PathText] = []
    """Python files that register preprocessors, datasets or reward functions. Each may stand here
    or in reward.external_plugins."""
    deduplicate: bool = False
    """Keep the first training row of each rendered text; the others are counted."""
    max_row_mb: PositiveInt = 8
    """Largest row of a text file, in MiB; a larger row is an error, often a missing line break."""
    prompt_template: str | None = None
    """A text with names of columns in braces, `"Question: {question}\\nAnswer:"`, which makes each
    prompt instead of the chat template: for base models. `"{prompt}"` is the bare column. null: the
    model's chat template; without one, rows need a column `prompt` with a text, taken as it is."""
    system: str | None = None
    """System message for rows without one; null adds none."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, `{enable_thinking: false}` for Qwen3. A row's own column
    `chat_template_kwargs` wins."""
    shuffle: bool = True
    """Shuffle the training rows in every epoch, by `seed`."""
    streaming: bool = False
    """Read and render training rows when they are needed, for data that does not fit in memory.
    Rows are then checked as they come, not before the run."""
    shuffle_buffer_size: PositiveInt = 10_000
    """Rows among which a streamed dataset is shuffled."""

    @field_validator("prompt_template")
    @classmethod
    def _names_columns(cls, template: str | None) -> str | None:
        if template is not None:
            template_columns(template)
        return template

    @field_validator("val_sets", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, sets: Any) -> Any:
        """Read `{math500: a.jsonl}` as `{math500: [a.jsonl]}`."""
        if not isinstance(sets, dict):
            return sets
        return {
            name: split_list(paths) if isinstance(paths, str) else paths
            for name, paths in sets.items()
        }

    @property
    def all_datasets(self) -> list[str]:
        """Every entry of `dataset`, `val_dataset` and `val_sets`."""
        return [*self.dataset, *self.val_dataset, *(p for s in self.val_sets.values() for p in s)]

    @property
    def has_held_out(self) -> bool:
        """Whether any rows are held out for evaluation."""
        return bool(self.val_dataset or self.val_sets or self.split_dataset_ratio)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _no_text_for_a_boolean(cls, variables: dict[str, Any]) -> dict[str, Any]:
        """Refuse "no" for a variable: templates ask `if enable_thinking`, and a text is true."""
        for name, value in variables.items():
            if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
                raise ValueError(f"{name}: {value} is a text, write true or false")
        return variables


class DataConfig(RowsConfig):
    """Where prompts come from."""

    max_eval_prompts: PositiveInt = 256
    """Held-out prompts to evaluate on, in each set; the first ones are taken."""
    max_prompt_length: PositiveInt = 512
    """Longest rendered prompt, in tokens; see `overlong_prompts`."""
    min_prompt_length: PositiveInt = 1
    """Shortest rendered prompt, in tokens; shorter ones are dropped and counted."""
    overlong_prompts: Literal["drop", "error"] = "drop"
    """Whether prompts over `max_prompt_length` are dropped and counted, or stop the run before
    training."""
    difficulty_sampling: bool = False
    """Skip prompts that teach nothing, because all completions of a group got the same reward."""
    difficulty_patience: PositiveInt = 2
    """Groups with equal rewards in a row after which a prompt is skipped."""
    difficulty_exploration: float = Field(default=0.1, gt=0.0, le=1.0)
    """Probability of sampling a prompt that is to be skipped; one group with different rewards
    brings it back."""


class ModelConfig(Section):
    """The language model that is trained."""

    path: PathText = Field(min_length=1)
    """Hugging Face model folder or hub id. docs/models.md lists the families."""
    bridge: Literal["auto", "rlsys", "mcore_bridge"] = "auto"
    """What reads and writes the weights. rlsys: its own table, which knows these families. On
    GPUs, mcore_bridge: the package mcore-bridge (`pip install 'rlsys[bridge]'`), which knows more;
    it gathers weights one tensor at a time, so weight sync takes longer. auto: rlsys where it knows
    the model, else mcore_bridge."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in policy, reference and rollout engine. auto: bfloat16 on GPUs, float32
    on CPU, where engines then agree to 1e-5."""
    fp32_lm_head: bool = False
    """Compute logits in float32 in policy, reference and rollout engine when `dtype` is bfloat16,
    so that their log-probs agree better (MiniMax-M1, arXiv:2506.13585; TRL's cast_lm_head_to_fp32).
    Weights stay in `dtype`. The policy needs vocabulary / tensor_parallel_size x hidden size x 4
    more bytes, and more time for logits."""


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


class RewardConfig(Section):
    """How completions are scored."""

    reward_funcs: list[RewardName] = []
    """Registered names, see `rlsys rewards list`."""
    reward_model: list[PathText] = []
    """Folders or hub ids of sequence-classification models (ms-swift: --reward_model). Each is one
    more reward function, reward_model:PATH, in a process of its own. Its settings stand in
    reward_params under that name, or under reward_model for all models."""
    reward_model_placement: Literal["policy", "own"] = "policy"
    """GPUs of reward models. policy: the policy ranks' GPUs, which idle meanwhile; the model's
    weights stay there, so leave room. own: one GPU for each model."""
    reward_weights: list[float] | None = None
    """One weight per reward function, then one per reward model; null is 1 for each."""
    reward_params: dict[RewardName, RewardSettings] = {}
    """Settings of reward functions by name, `{soft_overlong: {cache_length: 128}}`: keyword
    arguments of the class, or of the function's call. Parameters called max_completion_length or
    model_path get the run's own value unless given here."""
    external_plugins: list[PathText] = []
    """Python files that register reward functions, trackers, preprocessors or datasets. Each may
    stand here or in data.external_plugins."""
    gate: dict[RewardName, RewardName] = {}
    """Functions that count only where another one is high enough: `{accuracy: format}` or
    `{accuracy: format >= 0.5}`; without a number it is 1. Where the gate is lower, the function is
    not called and its value is 0. A gate may not have a gate."""
    num_workers: PositiveInt = 1
    """Reward processes; they score groups while others are sampled. Async functions share one more
    process."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that a reward function may take for one group. Then its process is killed, and each
    completion is tried alone with an equal share, at least a second, to find the one that hangs."""
    max_memory_mb: PositiveInt | None = None
    """MiB that a reward process and its children may hold before they are killed; null is a quarter
    of the machine's memory."""
    on_error: Literal["raise", "zero", "drop"] = "raise"
    """When a reward function raises or returns something that is not a reward: end the run with the
    traceback, score the completion 0, or drop it from the update."""
    on_timeout: Literal["raise", "zero", "drop"] | None = None
    """What happens to a completion that makes a reward function hang, crash or exceed its memory,
    as in on_error. null: on_error if that is zero or drop, otherwise zero, and the run goes on."""

    @property
    def names(self) -> list[str]:
        """All reward functions, reward models last: the order of their weights."""
        return self.reward_funcs + [REWARD_MODEL_PREFIX + path for path in self.reward_model]

    @property
    def names_that_check_rows(self) -> list[str]:
        """Reward functions whose check_row runs before training.

        Skips gated ones, which may never see such a row, and all when on_error is zero or drop.
        """
        if self.on_error != "raise":
            return []
        return [name for name in self.names if name not in self.gate]

    @property
    def models(self) -> list[str]:
        """The reward models among `names`."""
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
        """Settings by name; reward models have the shared ones and their path too."""
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
    """Clip range of the ratio: [1 - epsilon_low, 1 + epsilon_high], where both are epsilon unless
    set. With gmpo the range of the log ratio: [-epsilon_low, epsilon_high]. With dppo_tv and
    dppo_kl the greatest divergence of a token's probability: epsilon_high upwards, epsilon_low
    downwards."""
    epsilon_low: PositiveFloat | None = None
    """Lower clip range (verl's clip_ratio_low); null is epsilon, and for cispo no lower bound."""
    epsilon_high: PositiveFloat | None = None
    """Upper clip range (DAPO's clip-higher); null is epsilon."""
    delta: PositiveFloat | None = None
    """Upper bound of the ratio where the advantage is negative, above 1 + epsilon_high (TRL's
    delta, c of dual-clip PPO). null: none; 3 for dual_clip. With dppo_tv and dppo_kl the bound of
    every ratio; null is 20."""
    num_iterations: PositiveInt = 1
    """Passes over one rollout (mu in the paper)."""
    max_logp_difference: PositiveFloat | None = 1.0
    """End the run where log-probs of policy and rollout engine differ by more than this, in nats
    per token on average, for the same weights. A warning comes once rounding does not explain the
    difference. With rollout.max_staleness only the first step is checked. null never ends the
    run."""
    advantage_estimator: str = "grpo"
    """What a completion is compared with: grpo (mean of its group), rloo (mean of the others of its
    group), reinforce_plus_plus (mean of the batch), reinforce_plus_plus_baseline (mean of its
    group, scaled by the batch), maxrl (mean of its group, divided by that mean)."""
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    """Divide advantages by the std of rewards within the group, within the batch, or not at all.
    auto is the choice of the estimator's paper: group for grpo, none for rloo."""
    advantage_eps: PositiveFloat = 1e-4
    """Reward units added to that std."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Sum the reward functions, then compare; or compare each by itself, then sum (GDPO)."""
    mask_truncated_completions: bool = False
    """Do not train on completions cut at max_completion_length (DAPO's overlong filtering); they
    still count in the advantages of their group."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Estimator of the KL to the reference model; null is k3 in the loss and k1 in the reward."""
    kl_in_reward: bool = False
    """Subtract beta * KL from the rewards instead of adding it to the loss."""
    use_bias_correction_kl: bool = False
    """Multiply the KL in the loss by policy / sampler, which makes its gradient unbiased; for stale
    data too if `rollout_is` corrects for staleness (DeepSeek-V3.2)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus, averaged over tokens as the loss is; 0 is off."""
    top_entropy_quantile: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that get a policy gradient, highest entropy first;
    1 is all. Below 1 costs a forward pass."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Log-probs that the ratio starts from. auto: the trainer's before the update, computed only
    where the update's own would differ. recompute: the same, always computed.
    rollout: the rollout engine's, which saves a forward pass and clips against the
    policy that sampled."""
    rollout_is: RolloutCorrection = "auto"
    """Multiply the policy loss by old_logprobs / rollout_logprobs as probabilities: of the token,
    of the completion, or its geometric mean over tokens. Weights out of bounds are truncated, or
    set to 0 with token_mask and sequence_mask (TRL's vllm_importance_sampling_mode). auto: token
    where rollouts may be stale or quantised, else none."""
    rollout_is_threshold: PositiveFloat = 2.0
    """Upper bound of these weights (TRL's vllm_importance_sampling_clip_max)."""
    rollout_is_threshold_lower: PositiveFloat | None = None
    """Lower bound of these weights (TRL's vllm_importance_sampling_clip_min); null is none."""
    rollout_rs: RolloutRejection = "none"
    """Leave out what is out of bounds: tokens (IcePop) or completions by their weight (token,
    sequence, geometric), or by k2 or k3 of the log weights: of the token, or their sum, mean or
    maximum over the completion (verl)."""
    rollout_rs_threshold: PositiveFloat | None = None
    """Upper bound of what is kept. For weights at least 1, and null is 2; for k2 and k3 a
    divergence that must be set."""
    rollout_rs_threshold_lower: float | None = Field(default=None, ge=0.0, le=1.0)
    """Lower bound of the weights that are kept; null is 1 / rollout_rs_threshold, 0 is none.
    Divergences have no lower bound."""
    rollout_token_veto_threshold: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Leave out a completion if one of its tokens has a weight below this, such as 1e-4: the policy
    would hardly ever sample it. null leaves out none."""
    rollout_token_veto_threshold_high: float | None = Field(default=None, gt=1.0)
    """The same for tokens with a weight above this, such as 100 (SkyRL's outlier token mask)."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Leave out completions with a negative advantage whose log-probs fell by more than this since
    sampling, in nats per token (DeepSeek-V3.2). null leaves out none."""
    external_plugins: list[PathText] = []
    """Python files that register losses or advantage estimators."""
    loss_type: str = "grpo"
    """The policy's loss: grpo, bnpo, dapo, dr_grpo, dual_clip, gspo, luspo, cispo, sapo, vespo,
    gmpo, dppo_tv, dppo_kl, clip_cov, kl_cov, reinforce; see docs/algorithm.md."""
    loss_aggregation: Aggregation | None = None
    """Average of token losses over an optimizer step of M completions. token_mean: over all tokens.
    seq_mean_token_mean: mean of each completion, over M. seq_mean_token_sum: sum / M.
    seq_mean_token_sum_norm: sum / (M * max_completion_length). null is the choice of the loss's
    paper."""
    importance_sampling_level: Level | None = None
    """Level of the ratio of the clipped losses, cispo and sapo: each token, the sequence (GSPO),
    or the sequence with each token's gradient (GSPO-token). null is sequence for gspo and luspo,
    else token."""
    sapo_temperature_pos: PositiveFloat = 1.0
    """Steepness of sapo's gate for positive advantages."""
    sapo_temperature_neg: PositiveFloat = 1.05
    """Steepness of sapo's gate for all other advantages."""
    vespo_k_pos: NonNegativeFloat = 2.0
    """Power of the sequence's ratio in vespo's weight, for advantages of 0 and more: the larger,
    the less a completion counts that became unlikely."""
    vespo_lambda_pos: PositiveFloat = 3.0
    """Decay of vespo's weight, for advantages of 0 and more: the larger, the less a completion
    counts that became likely."""
    vespo_k_neg: NonNegativeFloat = 3.0
    """The same power for negative advantages."""
    vespo_lambda_neg: PositiveFloat = 2.0
    """The same decay for negative advantages."""
    clip_cov_ratio: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that clip_cov leaves out, at least one token: drawn from
    those whose covariance of log-prob and advantage is between clip_cov_lb and clip_cov_ub."""
    clip_cov_lb: float = 1.0
    """Least covariance of tokens that clip_cov may leave out."""
    clip_cov_ub: float = 5.0
    """Greatest covariance of tokens that clip_cov may leave out."""
    kl_cov_ratio: float = Field(default=2e-4, gt=0.0, le=1.0)
    """Share of an optimizer step's tokens that kl_cov penalizes, at least one token: those with the
    highest covariance of log-prob and advantage."""
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


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv:2106.09685): the base model stays as it is."""

    rank: PositiveInt = 8
    """Rows of A, columns of B: PEFT's r."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is multiplied by alpha / rank: PEFT's lora_alpha."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs that updates leave out; log-probs and evaluations leave out
    nothing."""
    target_modules: list[NonEmptyText] | str = "all-linear"
    """Linear layers with an adapter. all-linear: every one but the output head and routers. A list
    has Hugging Face's names, `[q_proj, v_proj]`, whole or their last parts; a text is a regex of
    whole names."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    modules_to_save: list[NonEmptyText] = []
    """Modules that are trained whole beside the adapters, such as embed_tokens, lm_head, norm."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts: PEFT's default (uniform, by Kaiming), or normal with a deviation of 1 / rank.
    B starts as 0."""
    path: PathText | None = None
    """Folder of the adapter to start from, as PEFT writes it: its rank, alpha and targets are taken
    over. null: new adapters."""

    @model_serializer(mode="wrap")
    def _without_the_adapters_own(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what the adapter in `path` decides: a saved config would contradict it."""
        fields: dict[str, Any] = values(self)
        if self.path is None:
            return fields
        return {name: value for name, value in fields.items() if name in self.model_fields_set}

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names_without_brackets(cls, value: Any) -> Any:
        """Read `q_proj` and `q_proj,v_proj` as names: as regexes they would match no whole name.

        Raises:
            ValueError: the value is empty, so no layer would have an adapter, or not a regex.
        """
        if value in ("", []):
            raise ValueError("names no layer: write all-linear, a list of names, or a regex")
        if value in ("all-linear", ["all-linear"]):
            return "all-linear"
        is_names = isinstance(value, str) and re.fullmatch(r"\w+( *, *\w+)*", value)
        if is_names:
            return re.findall(r"\w+", value)
        return check_regex(value) if isinstance(value, str) else value

    @field_validator("init", mode="before")
    @classmethod
    def _names_of_peft(cls, value: Any) -> Any:
        """Take PEFT's true for its default.

        Raises:
            ValueError: the value is an initialisation that changes the base model.
        """
        if value is True or value == "true":
            return "kaiming"
        if isinstance(value, str) and value.startswith(("pissa", "olora", "loftq", "corda", "eva")):
            raise ValueError(
                f"{value} is not supported: it changes the base model or reads data first, and the "
                "base of an rlsys run stays as it is. Write kaiming or gaussian"
            )
        return value


class PolicyConfig(Section):
    """The megatron-core trainer."""

    world_size: PositiveInt = 1
    """Ranks, each in an actor and process of its own, with a GPU of its own on GPUs."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer; above 1, sequence parallelism is on."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the layers among them."""
    pipeline_layout: str | None = None
    """Layers of each pipeline stage, in megatron-core's notation: `Et*3|t*5|t*4L` has 3, 5 and 4
    layers, the first with the embedding E, the last with the loss L. Twice as many stages as
    pipeline_parallel_size, or more, are virtual pipeline: rank r has the stages r, r + PP, ..., and
    each rank's micro-batches are filled up to a multiple of PP. null: equally many layers for each
    rank. The reference has one stage."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share the experts of each layer in a mixture of experts: tensor-parallel ranks
    first, then context-parallel, then data-parallel ones. Must be above 1 where
    tensor_parallel_size is."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each sequence, where its activations do not fit on one GPU.
    Sequences are padded to a multiple of twice this."""
    global_batch_size: PositiveInt | None = None
    """Completions per optimizer step; null: generation_batch_size, so one optimizer step per
    rollout."""
    micro_batch_size: PositiveInt = 8
    """Completions per forward pass of a data-parallel rank, of the reference too."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Tokens per forward pass of such a rank, in place of micro_batch_size; null counts
    completions."""
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
    use_precision_aware_optimizer: bool = False
    """Let Transformer Engine's AdamW hold its state in the types of the next four fields, and as
    float32 weights only the 16 bits that bfloat16 weights lack: 10 bytes a parameter instead of 12
    without any of the four. Needs GPUs, bfloat16 and use_distributed_optimizer."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the optimizer's copy of the weights."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are added up over micro-batches and ranks."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Type of AdamW's first moment."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Type of AdamW's second moment."""
    optimizer_cpu_offload: bool = False
    """Hold optimizer_offload_fraction of the optimizer's state in host memory, and update those
    weights on the host's CPU. With use_precision_aware_optimizer, whose types stay fp32."""
    optimizer_offload_fraction: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the parameters whose state is in host memory."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """With optimizer_cpu_offload: copy gradients and weights of one parameter while another one is
    updated."""
    overlap_grad_reduce: bool | None = None
    """Sum gradients over data-parallel ranks during the backward pass of the last micro-batch.
    null: on GPUs with several such ranks."""
    overlap_param_gather: bool | None = None
    """With use_distributed_optimizer: gather each part of the weights when the next forward pass
    needs it. After the last optimizer step of a rollout all are gathered at once, for the weight
    sync. null: where overlap_grad_reduce is on and a rollout has several optimizer steps, but
    not with policy.lora, whose adapters are small and are gathered at once."""
    attention_backend: Literal["auto", "fused", "flash", "unfused"] = "auto"
    """Attention kernels on GPUs of policy and reference, by Transformer Engine's names: fused is
    cuDNN's, flash needs flash-attn, flash-attn-3 or flash-attn-4, unfused is plain matrix products,
    slow and large. auto lets Transformer Engine choose. The CPU has one kind only."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them (megatron-core's
    recompute_granularity). selective: recompute_modules of every layer. full: whole layers, all but
    their inputs, for a third more time."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Layers for recompute: full. uniform: all, in groups of recompute_num_layers. block: the first
    recompute_num_layers of each pipeline stage, the others keep what they computed."""
    recompute_num_layers: PositiveInt = 1
    """Layers of a group with uniform, whose input alone is kept: more keep fewer inputs, and in
    the backward pass all activations of a group. Layers of each stage with block."""
    recompute_modules: list[
        Literal["core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts"]
    ] = Field(default=["mlp"], min_length=1)
    """Modules for recompute: selective. mlp: about two thirds of a layer's activations, for a
    quarter more time; experts, too. moe: experts only, and not the MLP of dense layers. moe_act:
    only the activation function of experts, on GPUs. shared_experts: the MLP that every token of a
    mixture goes through. layernorm: norms that are modules of their own, as before experts; on
    GPUs, norms of dense layers are a part of the linear layer. mla_up_proj: latent attention's
    projections up. core_attn: saves little where attention is fused, nothing where it is linear."""
    recompute_logits: bool = True
    """Compute logits again in the backward pass, all but those of a micro-batch's last 1,024
    tokens. false keeps them, tokens x vocabulary / tensor_parallel_size numbers, and saves a few
    percent of the time."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of all layers in FP8, of policy and reference, on GPUs of compute capability
    8.9 (Ada), 9.0 (Hopper) or higher. e4m3: in the backward pass too. hybrid: gradients in e5m2,
    which has more range. null: in the model's type."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 tensors are scaled. tensorwise: by their largest value. delayed: by that of the
    micro-batch before, which is megatron-core's default; the first update of a run, or after a
    resume, computes its gradients twice more, to learn them. blockwise: by that of 128 numbers, or
    128 x 128 weights, from compute capability 9.0. mxfp8: of 32 numbers, from 10.0 (Blackwell)."""
    fp8_param_gather: bool = False
    """Hold the layers' weights in FP8 only, beside the optimizer's float32, and gather them as
    such. Weight sync, checkpoints and exports get what they stand for, in the model's type. Needs
    use_distributed_optimizer, and is not there for mxfp8."""
    megatron_kwargs: dict[str, Any] = {}
    """More options of megatron-core's TransformerConfig, OptimizerConfig and
    DistributedDataParallelConfig, by their names: `{moe_router_fusion: true}`. An option that
    several of them have goes to each. Those of TransformerConfig are the reference's too, so that
    both models compute alike. Types are written as float32 or bfloat16. The memory estimate does
    not know them."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the loss that balances the experts of a mixture of experts, summed over layers; 0
    is off. Its value is 1 in a layer whose experts get equally many tokens."""
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss"] = "aux_loss"
    """Tokens among which that loss balances experts: all of a micro-batch (aux_loss), or of each
    row, prompt and completion (seq_aux_loss), which does not depend on how rows are packed."""
    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the router's z loss, which keeps its logits small, summed over layers; 0 is
    off."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    """Type in which routers compute their logits, of the reference too; null is fp32 for
    GLM-4.5 and DeepSeek's models, else the model's, as in transformers."""
    cpu_threads: PositiveInt = 1
    """Threads of each policy and reference rank on CPU."""
    lora: LoraConfig | None = None
    """Train adapters in place of the model's weights; null trains the weights."""
    freeze_parameters: list[NonEmptyText] = []
    """Starts of Hugging Face's names of tensors that are not trained: `[model.embed_tokens,
    model.layers.0.]`."""
    freeze_parameters_regex: Regex | None = None
    """Regex in the names of tensors that are not trained."""
    freeze_parameters_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of all parameters that is not trained, from the embedding up."""
    trainable_parameters: list[NonEmptyText] = []
    """Starts of names of tensors that are trained although one of the former freezes them."""
    trainable_parameters_regex: Regex | None = None
    """The same as a regex in names."""
    timeout_s: PositiveFloat = 1800.0
    """Seconds that one phase of the policy or of the reference may take."""

    @field_validator("pipeline_layout")
    @classmethod
    def _layout_can_be_read(cls, layout: str | None) -> str | None:
        if layout is not None:
            parse_layout(layout)
        return layout

    @property
    def freezes(self) -> bool:
        """Whether some of the model's parameters are not trained, without adapters."""
        return bool(
            self.freeze_parameters or self.freeze_parameters_regex or self.freeze_parameters_ratio
        )

    @property
    def virtual_pipeline_size(self) -> int:
        """Chunks of layers on each pipeline rank."""
        if self.pipeline_layout is None:
            return 1
        return len(parse_layout(self.pipeline_layout)) // self.pipeline_parallel_size


class ReferenceConfig(Section):
    """The frozen model of the KL term; exists only when grpo.beta > 0."""

    path: PathText | None = Field(default=None, min_length=1)
    """Hugging Face model folder or hub id; null is model.path. With policy.lora and null it is the
    policy itself with its adapter off, also one of policy.lora.path, and not a second model in
    memory."""
    world_size: PositiveInt = 1
    """Ranks. Ranks that share neither layers nor tokens are replicas."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each sequence."""
    sync_steps: PositiveInt | None = None
    """Steps between two copies of the policy's weights (TRL's ref_model_sync_steps); null never
    copies."""
    mixup_alpha: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the policy's weights in that copy; the rest is the reference's own (TR-DPO,
    arXiv:2404.09656; TRL's ref_model_mixup_alpha)."""
    placement: Literal["policy", "own"] = "policy"
    """GPUs of the reference. policy: rank r runs on the GPU of policy rank r, and its weights wait
    in host memory meanwhile. own: GPUs of its own, which saves that copy."""


class WeightSyncConfig(Section):
    """How the rollout engines get the policy's weights after every update."""

    transport: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights travel. auto: NCCL between GPUs, gloo on CPU, and ipc where policy and engines
    share GPUs (`placement: colocated`), which hands over memory of the same GPU."""
    bucket_mb: PositiveInt = 256
    """MiB sent at once. Both sides keep two such buffers, or larger ones if the largest tensor,
    often the embedding, is larger. Between two H200s more is not faster, and 64 takes twice as
    long."""
    in_place: bool = True
    """Copy straight into the rollout engine's parameters where they can be mapped, which the first
    update proves. false uses vLLM's own loader, as CPU engines always do for packed weights."""
    lora: Literal["auto", "adapter", "merged"] = "auto"
    """What engines get of a policy with policy.lora. adapter: the base once, then the adapter
    alone, which vLLM computes beside the base, as the policy does. merged: base + adapter as one
    model, which samples faster; in bfloat16 the sum is rounded. auto: adapter on GPUs where vLLM
    can, else merged."""
    verify: bool = True
    """Compare a checksum of every bucket on both sides."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that one phase of a weight sync may take."""


class EvalConfig(Section):
    """Evaluation on held-out prompts: every `eval_steps` of a run, and `rlsys eval`."""

    num_generations: PositiveInt = 1
    """n, completions per held-out prompt (TRL: num_generations_eval; verl: val_kwargs.n). Above 1,
    evaluations log pass@k, mean@n, maj@n and standard errors."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; 0 is greedy, with num_generations 1. null: rollout.temperature."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Nucleus sampling. null: rollout.top_p."""
    top_k: NonNegativeInt | None = None
    """Sample among the k likeliest tokens; 0 is off. null: rollout.top_k."""
    correct: NonEmptyText | None = None
    """When a completion counts as correct in pass@k and maj@n: a reward function whose value is at
    least 1, or NAME >= NUMBER. null: the function with "accuracy" in its name, else the first."""
    pass_at_k: list[PositiveInt] = []
    """k of pass@k, at most num_generations. Empty: 1, 2, 4, ... and num_generations."""


class TrackersConfig(Section):
    """Where metrics go, besides metrics.jsonl."""

    report_to: list[str] = ["tensorboard"]
    """More trackers by name: tensorboard, wandb (which needs `pip install wandb`); none or [] for
    no more."""
    run_name: PathText | None = None
    """Name of the run in trackers; null is the name of output_dir."""
    wandb_project: PathText = "rlsys"
    """Project of the run in wandb."""

    @field_validator("report_to")
    @classmethod
    def _none_is_none(cls, names: list[str]) -> list[str]:
        return [] if names == ["none"] else names


class TrackingConfig(TrackersConfig):
    """Where metrics and completions go, besides metrics.jsonl and completions.jsonl."""

    log_completions: bool = True
    """Append every completion to completions.jsonl when its group gets its place in a batch."""


AUTO_SAVES = 20
"""A run that is killed loses 1/20 of its steps at most."""


class CheckpointConfig(Section):
    """What a run continues from. Every checkpoint, OUTPUT_DIR/checkpoints/step-N, is a model
    folder that transformers and vLLM load, and holds the optimizer's state besides. The final model
    is always written to OUTPUT_DIR/final."""

    save_steps: PositiveInt | Literal["auto"] | None = "auto"
    """Steps between two checkpoints; the last step is saved too. auto: 5% of max_steps, or more
    where saving would take over a tenth of the time. null: no checkpoints."""
    save_total_limit: PositiveInt = 2
    """Checkpoints to keep, the newest ones; while one is written there is one more."""
    exit_timeout_s: PositiveFloat = 600.0
    """Seconds that a run may take, after Ctrl-C, SIGTERM or a failure, to save the last finished
    step: its weights in OUTPUT_DIR/interrupted, then a checkpoint unless save_steps is null. A
    second Ctrl-C ends it at once."""
    save_hf_steps: PositiveInt | None = None
    """Steps between two Hugging Face folders without optimizer, OUTPUT_DIR/hf/step-N: models to
    evaluate or serve later, a fraction of a checkpoint's size. null: none."""
    save_hf_total_limit: PositiveInt | None = None
    """Folders of save_hf_steps to keep, the newest ones; null: all."""
    resume: bool = False
    """Continue the run in output_dir from its newest checkpoint."""

    def interval(self, max_steps: int) -> int | None:
        """Steps between two checkpoints; None writes none."""
        if self.save_steps == "auto":
            return max(1, max_steps // AUTO_SAVES)
        return self.save_steps


AnyConfig = TypeVar("AnyConfig", bound="RunConfig")


class RunConfig(Section):
    """What a run is, whatever it trains with: `Config` and `SftConfig` add their own sections.

    The properties without a body are what engines and loops ask of every config.
    """

    command: ClassVar[str]
    """The subcommand of `rlsys` that runs it."""
    row_noun: ClassVar[str]
    """What a training row is called."""
    has_rollouts: ClassVar[bool] = False
    """Whether the run samples completions, with vLLM."""
    default_batch_size: ClassVar[str]
    """What policy.global_batch_size is by default."""

    output_dir: PathText = Field(min_length=1)
    """Folder for everything a run writes. If it holds another run, checkpoint.resume or overwrite
    decides."""
    overwrite: bool = False
    """Start from step 0 in an output_dir that holds another run, whose files are moved to
    OUTPUT_DIR/replaced-1 (then replaced-2, ...). With checkpoint.resume: only where there is no
    checkpoint, so a job that is restarted again and again needs both."""
    max_steps: PositiveInt | None = None
    """Steps of the run: in GRPO one rollout, one policy update and one weight sync each, in SFT one
    optimizer step. null: num_train_epochs decides. One of the two must be set. max_steps wins,
    unless only num_train_epochs is on the command line."""
    num_train_epochs: PositiveFloat | None = None
    """Passes over the training rows: max_steps = num_train_epochs x rows / rows per step, rounded
    up, once the data is loaded. Not with data.streaming. Prompts that rollout.dynamic_sample draws
    again do not count."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations on held-out rows; the first is before step 1. null: no
    evaluation."""
    hub: Hub = "hf"
    """Where models and datasets with an id, and not a path, come from: the Hugging Face hub, or
    ModelScope (`pip install 'rlsys[modelscope]'`). `hf::` or `ms::` before one id wins."""
    seed: int = Field(default=42, ge=0, lt=2**31)
    """Seeds data order, sampling and mini-batches."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What every role of the run computes on. auto: GPUs if this machine or the Ray cluster has
    any. cpu leaves the GPUs of a host alone."""
    placement_timeout: PositiveFloat | Literal["wait"] | None = 60.0
    """Seconds to wait for GPUs of the Ray cluster that other runs use (on CPU, for CPUs) before
    this run fails. wait or null: wait until they are free. A line every half minute says what is
    missing."""
    rendezvous_ports: str | None = None
    """TCP ports at which ranks meet, as in `20000-20099`, for a firewall between hosts: those of
    torch's stores on the hosts of the driver, of policy rank 0 and of reference rank 0. null: any
    free port. NCCL and gloo take their ports from the kernel's range, see docs/cluster.md."""
    data: RowsConfig
    model: ModelConfig
    policy: PolicyConfig = PolicyConfig()
    tracking: TrackersConfig = TrackersConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("rendezvous_ports")
    @classmethod
    def _ports_can_be_read(cls, ports: str | None) -> str | None:
        if ports is not None:
            parse_ports(ports)
        return ports

    @property
    def store_ports(self) -> range | None:
        """rendezvous_ports."""
        return None if self.rendezvous_ports is None else parse_ports(self.rendezvous_ports)

    @model_validator(mode="after")
    def _ids_name_their_hub(self) -> Self:
        """With hub: modelscope, write `ms::` before ids: what reads a name needs no config."""
        if self.hub == "modelscope":
            sets = self.data.val_sets.items()
            self._change("model", path=model_of_modelscope(self.model.path))
            self._change(
                "data",
                dataset=list(map(dataset_of_modelscope, self.data.dataset)),
                val_dataset=list(map(dataset_of_modelscope, self.data.val_dataset)),
                val_sets={name: list(map(dataset_of_modelscope, paths)) for name, paths in sets},
            )
        return self

    def _change(self, section: str, **fields: Any) -> None:
        changed = getattr(self, section).model_copy(update=fields)
        object.__setattr__(self, section, changed)  # this object is not yet in use

    @property
    @abstractmethod
    def rows_per_step(self) -> int:
        """Training rows of one step: prompts of GRPO, samples of SFT."""

    @property
    @abstractmethod
    def global_batch_size(self) -> int:
        """Rows of a `TrainBatch` per optimizer step."""

    @property
    @abstractmethod
    def optimizer_steps_per_update(self) -> int:
        """Optimizer steps of one step of the run."""

    @property
    @abstractmethod
    def longest_row(self) -> int:
        """Most tokens of a row of a `TrainBatch`."""

    @property
    @abstractmethod
    def longest_row_is(self) -> str:
        """The fields that `longest_row` comes from."""

    @property
    @abstractmethod
    def max_completion_length(self) -> int:
        """Most tokens of a row that are trained on."""

    @property
    @abstractmethod
    def algorithm(self) -> GrpoConfig:
        """The loss and its settings."""

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of `rlsys.algo.sampling.Sampling`, by which log-probs are taken."""
        return {}

    @property
    def replays_routing(self) -> bool:
        """Whether the policy sends tokens to the experts that a rollout engine chose."""
        return False

    @property
    def largest_context_parallel_size(self) -> int:
        """Context-parallel ranks of the model that has most."""
        return self.policy.context_parallel_size

    @property
    def logs_completions(self) -> bool:
        """Whether the run records what it samples."""
        return False

    @property
    def reference_changes(self) -> bool:
        """Whether a checkpoint holds the weights of a reference."""
        return False

    @property
    def is_colocated(self) -> bool:
        """Whether rollout engines share the policy's GPUs."""
        return False

    @property
    def policy_shares_gpus(self) -> bool:
        """Whether other models compute on the policy's GPUs while it waits."""
        return False

    @property
    def loss_plugins(self) -> list[str]:
        """Python files that register losses and advantage estimators."""
        return []

    @property
    def plugins(self) -> list[str]:
        """All Python files, modules and packages that the run loads."""
        return self.data.external_plugins

    @property
    def model_paths(self) -> list[str]:
        """Folders and hub ids of all models that the run reads."""
        return [self.model.path]

    def steps_of_epochs(self, num_rows: int) -> int | None:
        """max_steps for num_train_epochs passes over `num_rows` training rows."""
        if self.num_train_epochs is None:
            return None
        return max(1, math.ceil(round(self.num_train_epochs * num_rows / self.rows_per_step, 9)))

    def with_steps(self, num_rows: int) -> Self:
        """This config with max_steps set, for `num_rows` training rows."""
        if self.max_steps is not None:
            return self
        return self.model_copy(update={"max_steps": self.steps_of_epochs(num_rows)})

    @property
    def num_steps(self) -> int:
        """Steps of the run; only after `with_steps`."""
        assert self.max_steps is not None, "num_train_epochs needs the number of rows"
        return self.max_steps

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
                and self.policy.lora is None
                and self.optimizer_steps_per_update > 1
                and self.overlaps_grad_reduce(on_cpu=on_cpu)
            )
        return self.policy.overlap_param_gather

    def may_bridge(self, *, on_cpu: bool) -> bool:
        """Whether mcore-bridge may have the weights; it needs Transformer Engine, so GPUs."""
        return not on_cpu and self.model.bridge != "rlsys"

    def model_dtype(self, *, on_cpu: bool) -> Literal["float32", "bfloat16"]:
        """The weights' type on the device of the run."""
        if self.model.dtype == "auto":
            return "float32" if on_cpu else "bfloat16"
        return self.model.dtype

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the policy."""
        policy = self.policy
        return policy.world_size // (
            policy.tensor_parallel_size
            * policy.pipeline_parallel_size
            * policy.context_parallel_size
        )


class ColocatedConfig(Section):
    """What moves to host memory while rollout engines have the GPUs that they share."""

    offload_optimizer: bool = True
    """Keep the optimizer's state in pinned host memory while engines sample (ms-swift's
    offload_optimizer): 12 bytes a parameter, unless policy's dtypes say otherwise."""
    offload_weights: bool | Literal["auto"] = "auto"
    """Keep the policy's weights there too (ms-swift's offload_model). auto: where they are more
    than a tenth of the GPU."""


class Config(RunConfig):
    """One GRPO run."""

    command: ClassVar[str] = "grpo"
    row_noun: ClassVar[str] = "prompt"
    has_rollouts: ClassVar[bool] = True
    default_batch_size: ClassVar[str] = "rollout.generation_batch_size"

    placement: Literal["auto", "dedicated", "colocated"] = "auto"
    """GPUs of policy and rollout engines. dedicated: their own, so both can work at the same time.
    colocated: engine i shares the GPU of policy rank i, and they take turns: one GPU is enough.
    auto: colocated where dedicated needs more GPUs than there are. On CPU auto is dedicated."""
    colocated: ColocatedConfig = ColocatedConfig()
    data: DataConfig
    tracking: TrackingConfig = TrackingConfig()
    rollout: RolloutConfig
    reward: RewardConfig
    grpo: GrpoConfig = GrpoConfig()
    reference: ReferenceConfig = ReferenceConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _further_ids_name_their_hub(self) -> Self:
        if self.hub == "modelscope":
            reward = self.reward
            params = {
                name: own | {"path": model_of_modelscope(own["path"])}
                for name, own in reward.params.items()
                if name in reward.models and isinstance(own.get("path"), str)
            }
            self._change("reward", reward_params=reward.reward_params | params)
            if self.reference.path is not None:
                self._change("reference", path=model_of_modelscope(self.reference.path))
            if (draft := self.rollout.draft_model) is not None:
                changed = self.rollout.speculation | {"model": model_of_modelscope(draft)}
                self._change("rollout", speculative_config=changed)
        return self

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        problems = cross_field_problems(self)
        if problems:
            raise ProblemsError("the config", problems)
        return self

    @property
    def is_colocated(self) -> bool:
        """Whether engines share the policy's GPUs; only after `decide_placement`."""
        return self.placement == "colocated"

    @property
    def num_prompts(self) -> int:
        """P, prompts per step."""
        return self.rollout.generation_batch_size // self.rollout.num_generations

    @property
    def rows_per_step(self) -> int:
        """Prompts per step."""
        return self.num_prompts

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt and completion that the config allows."""
        return self.data.max_prompt_length + self.rollout.max_completion_length

    @property
    def longest_row_is(self) -> str:
        """Both fields, with their values."""
        prompt = self.data.shown("max_prompt_length")
        completion = self.rollout.shown("max_completion_length")
        return f"data.max_prompt_length {prompt} + rollout.max_completion_length {completion}"

    @property
    def max_completion_length(self) -> int:
        """rollout.max_completion_length."""
        return self.rollout.max_completion_length

    @property
    def sampling(self) -> dict[str, Any]:
        """How completions are sampled: log-probs of policy and reference are taken the same way."""
        rollout = self.rollout
        main = {"temperature": rollout.temperature, "top_k": rollout.top_k, "top_p": rollout.top_p}
        return main | rollout.min_p_and_penalties

    @property
    def replays_routing(self) -> bool:
        """rollout.router_replay."""
        return self.rollout.router_replay

    @property
    def loss_plugins(self) -> list[str]:
        """grpo.external_plugins."""
        return self.grpo.external_plugins

    @property
    def plugins(self) -> list[str]:
        """All Python files, modules and packages that the run loads."""
        return [*super().plugins, *self.reward.external_plugins, *self.grpo.external_plugins]

    @property
    def model_paths(self) -> list[str]:
        """Policy, reference, reward models, and the model that drafts."""
        draft = [] if self.rollout.draft_model is None else [self.rollout.draft_model]
        return [*super().model_paths, self.reference_path, *self.reward.model_paths, *draft]

    @property
    def num_prompts_ahead(self) -> int:
        """x, prompts sampled beyond the next batch."""
        if self.rollout.oversample_prompts is not None:
            return self.rollout.oversample_prompts
        return self.rollout.max_staleness * self.num_prompts

    @property
    def global_batch_size(self) -> int:
        """Completions per optimizer step."""
        return self.policy.global_batch_size or self.rollout.generation_batch_size

    @property
    def optimizer_steps_per_update(self) -> int:
        """Optimizer steps between two weight syncs."""
        per_pass = self.rollout.generation_batch_size // self.global_batch_size
        return per_pass * self.grpo.num_iterations

    @property
    def recompute_old_logprobs(self) -> bool:
        """Whether the policy's log-probs before the update need a forward pass.

        They do when the policy moves within one rollout, when the KL is part of the reward, when
        entropies or covariances choose tokens, and when the update computes with dropout, which
        engines do not sample with.
        """
        grpo, lora = self.grpo, self.policy.lora
        if grpo.old_logprobs == "auto":
            needed = (grpo.kl_in_reward and grpo.beta > 0) or grpo.top_entropy_quantile < 1
            needed = needed or grpo.loss_type in COVARIANCE_LOSSES
            needed = needed or (lora is not None and lora.dropout > 0)
            return needed or self.optimizer_steps_per_update > 1
        return grpo.old_logprobs == "recompute"

    @property
    def algorithm(self) -> GrpoConfig:
        """`grpo` with what depends on other sections decided."""
        rollout_is = self.grpo.rollout_is
        if rollout_is == "auto":
            # With the engine's own log-probs as old_logprobs, the ratio corrects already.
            quantised = self.rollout.quantization and self.grpo.old_logprobs != "rollout"
            rollout_is = "token" if self.rollout.max_staleness or quantised else "none"
        return self.grpo.model_copy(update={"rollout_is": rollout_is})

    @property
    def eval_correct(self) -> Gate:
        """eval.correct, decided."""
        if self.eval.correct is not None:
            return parse_gate(self.eval.correct)
        names = self.reward.names
        return Gate(next((name for name in names if "accuracy" in name), names[0]))

    @property
    def eval_ks(self) -> list[int]:
        """eval.pass_at_k, decided: ascending."""
        n = self.eval.num_generations
        powers = [2**i for i in range(n.bit_length()) if 2**i < n]
        return sorted(set(self.eval.pass_at_k)) or [*powers, n]

    @property
    def run_values(self) -> dict[str, Any]:
        """Values for reward parameters with these names that reward.reward_params leaves out."""
        return {
            "max_completion_length": self.rollout.max_completion_length,
            "model_path": self.model.path,
        }

    @property
    def largest_context_parallel_size(self) -> int:
        """Context-parallel ranks of the policy, or of the reference if it has more."""
        reference = self.reference.context_parallel_size if self.has_reference_model else 1
        return max(self.policy.context_parallel_size, reference)

    @property
    def policy_shares_gpus(self) -> bool:
        """Whether other models compute on the policy's GPUs while it waits."""
        return (
            self.is_colocated
            or (self.has_reference_model and self.reference.placement == "policy")
            or (bool(self.reward.models) and self.reward.reward_model_placement == "policy")
        )

    @property
    def logs_completions(self) -> bool:
        """tracking.log_completions."""
        return self.tracking.log_completions

    @property
    def reference_changes(self) -> bool:
        """Whether the reference takes weights from the policy."""
        return self.grpo.beta > 0 and self.reference.sync_steps is not None

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy with its LoRA adapter off."""
        return self.grpo.beta > 0 and self.policy.lora is not None and self.reference.path is None

    @property
    def has_reference_model(self) -> bool:
        """Whether the run has a reference that is a model of its own."""
        return self.grpo.beta > 0 and not self.reference_is_base

    @property
    def reference_path(self) -> str:
        """Model folder or hub id of the reference."""
        return self.reference.path or self.model.path

    def syncs_reference(self, step: int) -> bool:
        """Whether the reference takes the policy's weights after `step`."""
        return self.reference.sync_steps is not None and step % self.reference.sync_steps == 0
