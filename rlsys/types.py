"""What crosses an actor boundary: small dataclasses of CPU data.

Payloads hold no CUDA tensors and no engines. Actors get the config once, in their constructor.
Shapes use one legend everywhere: **P** prompts, **G** generations per prompt, **N = P*G**
completions, **S** tokens of a padded row, **T** tokens of one completion.

Importing this module needs neither torch nor numpy, so reward workers stay small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

Device = Literal["cpu", "cuda"]
"""What a run computes on."""
FinishReason = Literal["stop", "length", "abort"]
RewardFailure = Literal["timeout", "crashed", "error"]
"""Why a reward function gave no value for a completion: it was killed after reward.timeout_s, its
process ended, or it raised or returned something that is not a reward."""
Message = dict[str, Any]
"""One chat turn, `{"role": "user", "content": "..."}`."""


OPEN_THINK = "<think>"
"""Begins the thinking of a completion, or ends a prompt whose completion continues it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of the dataset, ready to sample from."""

    prompt_id: str
    """Unique within a data set split; stable across runs, so logs can be joined on it."""
    messages: list[Message]
    token_ids: list[int]
    """The rendered chat template, generation prompt included."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column of the row; reward functions receive them by keyword."""
    opens_think: bool = False
    """Whether the prompt ends with `<think>`, so that completions begin inside the tag."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence of supervised training: a conversation with its answers, or a piece of text."""

    sample_id: str
    """Unique within a data set split; stable across runs, as `Prompt.prompt_id` is."""
    token_ids: np.ndarray
    """[T] int32, T >= 2: the whole rendered conversation or text."""
    target_mask: np.ndarray
    """[T] bool, True on the tokens whose loss is trained on, which are those that the model would
    write; at least one, and never the first token, which nothing predicts."""

    @property
    def num_targets(self) -> int:
        """Tokens that are trained on."""
        return int(self.target_mask.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Preference:
    """The answers to one prompt that preference training compares, or one answer with a label."""

    row_id: str
    """Unique within a data set split; stable across runs, as `Prompt.prompt_id` is."""
    answers: tuple[Sample, ...]
    """The chosen and the rejected answer, each behind the prompt; or one answer alone."""
    is_chosen: tuple[bool, ...]
    """Of each answer: whether it is the preferred, or a desirable one."""

    @property
    def token_ids(self) -> list[int]:
        """The token ids of all answers."""
        return [token for answer in self.answers for token in answer.token_ids.tolist()]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRow:
    """Texts with what their scores are compared with: a pair of answers, or a text with a label."""

    row_id: str
    """Unique within a data set split; stable across runs, as `Prompt.prompt_id` is."""
    texts: tuple[np.ndarray, ...]
    """[T] int32 token ids of each, T >= 2: the chosen and the rejected conversation, or one
    text."""
    label: tuple[float, ...]
    """[L] the number of the class; 0 or 1 for each class; or numbers. Of a pair its margin."""

    @property
    def token_ids(self) -> list[int]:
        """The token ids of all texts."""
        return [token for text in self.texts for token in text.tolist()]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled continuation of a prompt."""

    token_ids: list[int]
    """[T] sampled tokens; the last one is what ended it when `finish_reason` is "stop"."""
    rollout_logprobs: list[float]
    """[T] nats, of each sampled token under the distribution it was sampled from."""
    text: str
    """Decoded without the token that ended it, and without special tokens as
    rollout.skip_special_tokens says: what reward functions and people read."""
    finish_reason: FinishReason
    """"length" means cut at max_completion_length: TRL's and ms-swift's `clipped`."""
    policy_versions: tuple[int, ...]
    """The weight versions it was sampled under, in order; one unless weights changed in flight."""
    version_starts: tuple[int, ...] = (0,)
    """The index in `token_ids` of the first token of each of `policy_versions`: versions (3, 4)
    with starts (0, 57) mean that tokens 0 to 56 are of version 3, and the others of version 4."""
    routed_experts: np.ndarray | None = None
    """[prompt + T - 1, layers with experts, top_k] uint8 or int16, the experts that the rollout
    engine chose for each token that it read: all but the last. None without
    rollout.router_replay."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt to sample a group of completions for."""

    ticket: int
    """Comes back with the group; no other group in flight has it."""
    prompt: Prompt
    num_generations: int
    """G, completions."""
    temperature: float
    """Temperature of sampling and of the log-probs; 0 is greedy."""
    seed: int | None
    """Completion i is sampled with seed + i; None leaves it to the engine's own generator."""
    top_p: float | None = None
    """None: rollout.top_p."""
    top_k: int | None = None
    """None: rollout.top_k."""


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What became of the drafts of speculative decoding."""

    num_drafts: int
    """Steps of a sequence that had drafted tokens to check."""
    num_draft_tokens: int
    num_accepted_tokens: int
    """The drafted tokens that became part of a completion. Each step adds one more token."""

    def __add__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.num_drafts + other.num_drafts,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
        )

    def __sub__(self, other: DraftCounts) -> DraftCounts:
        return DraftCounts(
            self.num_drafts - other.num_drafts,
            self.num_draft_tokens - other.num_draft_tokens,
            self.num_accepted_tokens - other.num_accepted_tokens,
        )


@dataclass(frozen=True, slots=True)
class RewardOutput:
    """The score of one completion."""

    total: float
    """Weighted sum over the reward functions that have a value; advantages are computed from it.
    NaN: the completion is dropped from advantages, loss and group statistics."""
    by_name: dict[str, float]
    """The unweighted value of each reward function, in the configured order. NaN: the function
    returned None, does not apply to this completion, or failed under `on_error: drop`."""
    failures: dict[str, RewardFailure] = field(default_factory=dict)
    """The functions that failed on this completion; normally none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that reward functions add to completions.jsonl (`log_extra`)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics that they log (`log_metric`), by their keys."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G completions of one prompt: the unit in which GRPO compares."""

    ticket: int
    """The ticket of its `SampleRequest`."""
    prompt: Prompt
    completions: list[Completion]
    """[G]"""
    rewards: list[RewardOutput] = field(default_factory=list)
    """[G], empty until scored."""
    group_id: int | None = None
    """Number of the group within its step, under which it is logged, 0 <= group_id < P; None before
    it belongs to a step. With `max_staleness: 0` it is the position of the prompt in the step's
    batch."""


@dataclass(frozen=True, slots=True, eq=False)
class TeacherRows:
    """What a teacher says of N rows: arrays [L, ...] of each, L the row's tokens that are trained
    on, in their order. Either hidden states, or the likeliest tokens."""

    hidden: list[np.ndarray] = field(default_factory=list)
    """[N] arrays [L, D], last hidden states; float32, or int16 that are the bits of bfloat16."""
    top_ids: list[np.ndarray] = field(default_factory=list)
    """[N] arrays [L, K] int64"""
    top_logprobs: list[np.ndarray] = field(default_factory=list)
    """[N] arrays [L, K] float32, of the distribution over the whole vocabulary."""


@dataclass(slots=True)
class TrainBatch:
    """N completions as right-padded rows `prompt + completion`.

    One alignment rule for every [N, S] tensor: entry [n, s] belongs to `input_ids[n, s]`, so
    `logprobs[n, s] = log pi(input_ids[n, s] | input_ids[n, :s])`, in nats, 0 where
    `completion_mask` is False.
    """

    input_ids: torch.Tensor
    """[N, S] int64, pad tokens on the right."""
    lengths: torch.Tensor
    """[N] int64, prompt + completion tokens of each row."""
    completion_mask: torch.Tensor
    """[N, S] bool, True on the tokens that are trained on."""
    advantages: torch.Tensor
    """[N, S] float32, 0 where masked."""
    rollout_logprobs: torch.Tensor
    """[N, S] float32, from the rollout engine."""
    ref_logprobs: torch.Tensor | None = None
    """[N, S] float32, from the frozen reference model; None when beta = 0."""
    teacher_logprobs: torch.Tensor | None = None
    """[N, S] float32, from the teacher; None without on-policy distillation."""
    old_logprobs: torch.Tensor | None = None
    """[N, S] float32, from the policy before the update; None when one optimizer step uses the
    whole batch, because the policy's own detached log-probs are the same numbers then."""
    entropies: torch.Tensor | None = None
    """[N, S] float32 nats, of the distributions that the policy before the update predicted these
    tokens from; None where `old_logprobs` are not the policy's."""
    high_covariance: torch.Tensor | None = None
    """[N, S] bool, tokens that the losses clip_cov and kl_cov treat apart; None for others."""
    kept: torch.Tensor | None = None
    """[N] bool, False for a completion without a reward, which counts in no mean; None keeps all.
    A kept completion counts even if `completion_mask` leaves it no tokens."""
    routed_experts: list[np.ndarray] | None = None
    """[N] arrays, `Completion.routed_experts` of each row. Arrays that Ray shares among processes
    are not copied, which matters: a token has top_k bytes for each layer with experts."""
    is_chosen: torch.Tensor | None = None
    """[N] bool, `Preference.is_chosen` of each row. In pairs a rejected answer follows the chosen
    one. None for other training. `advantages` then are the share of each token of chosen answers in
    the mean of their negative log-likelihood."""
    ref_logps: torch.Tensor | None = None
    """[N] float64, the reference's log-prob of each answer as a whole, in nats; None without
    reference."""
    kl: torch.Tensor | None = None
    """[1] float64 nats, KTO's estimate of KL(policy || reference) for the whole step; None for
    other losses."""
    labels: torch.Tensor | None = None
    """[N, L] float32, what the scores of a row are compared with; None without a score head. In
    pairs, where a rejected answer follows the chosen one, both have the margin of the pair."""
    teacher: TeacherRows | None = None
    """What the teacher says of each token that is trained on, for its divergence."""


@dataclass(frozen=True, slots=True)
class UpdateOutput:
    """What one policy update reports, already reduced over ranks."""

    policy_version: int
    """Number of completed updates: the weight version that the next publish sends."""
    metrics: dict[str, float]
    rolls_back: str | None = None
    """Why the policy has to go back to an earlier state before this update is made, which is not
    finished and has not raised policy_version; None: it is finished."""
