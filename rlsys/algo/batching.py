"""From scored groups to packed micro-batches, without changing the gradient on the way.

A rollout of N completions is cut three times: into optimizer steps (`optimizer_step_rows`), into
data-parallel shards (`shard_rows`) and into forward passes (`micro_batches`). Only the first cut
is part of the algorithm. The other two change nothing, because `loss_weights` carries the
denominators of the whole optimizer step into every token before anything is split.

A micro-batch is packed: its rows end to end in one sequence, so that no pad token is computed. A
`TrainBatch` aligns values with the token they belong to, but a model's output at position t
predicts the token at t + 1: a `PackedMicroBatch` is aligned with the *predicting* position, shifted
left by one.

    TrainBatch  input_ids  p0 p1 c0 c1 --     completion_mask  0  0  1  1  0
    packed      input_ids  p0 p1 c0 c1
                targets    p1 c0 c1  0        loss_mask        0  1  1  0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from rlsys.types import TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.types import RolloutGroup


def build_train_batch(groups: list[RolloutGroup]) -> TrainBatch:
    """Right-padded rows `prompt + completion`, in group order, for `TrainBatch`.

    Advantages are 0, and every sampled token is marked: the EOS token, and the tokens of a
    completion that was cut at the length limit. What is then not trained on, `leave_out` says.

    Args:
        groups: P groups of G completions each.

    Raises:
        ValueError: a prompt without tokens, whose first completion token nothing could predict.
    """
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    lengths = [len(prompt.token_ids) + len(completion.token_ids) for prompt, completion in rows]
    shape = (len(rows), max(lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)  # `pack` drops the padding again
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    rollout_logprobs = torch.zeros(shape, dtype=torch.float32)
    for n, (prompt, completion) in enumerate(rows):
        start, end = len(prompt.token_ids), lengths[n]
        if start == 0:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has no tokens: its completions' first token has "
                f"nothing to follow. Remove the row, or use a chat template that adds tokens."
            )
        assert len(completion.rollout_logprobs) == end - start, prompt.prompt_id
        input_ids[n, :end] = torch.tensor(prompt.token_ids + completion.token_ids)
        completion_mask[n, start:end] = True
        rollout_logprobs[n, start:end] = torch.tensor(completion.rollout_logprobs)
    return TrainBatch(
        input_ids=input_ids,
        lengths=torch.tensor(lengths),
        completion_mask=completion_mask,
        advantages=torch.zeros(shape),
        rollout_logprobs=rollout_logprobs,
    )


def optimizer_step_rows(
    num_rows: int, *, global_batch_size: int, num_iterations: int, seed: int
) -> list[list[int]]:
    """The rows of each optimizer step of a rollout, `num_iterations` passes over all rows.

    Each pass is a fresh permutation, seeded by `seed`, cut into steps of `global_batch_size`; it is
    left out when one step holds all rows, since order within a step does not matter.

    Raises:
        ValueError: `num_rows` is not a multiple of `global_batch_size`.
    """
    if num_rows % global_batch_size:
        raise ValueError(
            f"{num_rows} completions a rollout cannot be cut into optimizer steps of "
            f"{global_batch_size}: make rollout.generation_batch_size a multiple of "
            f"policy.global_batch_size"
        )
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(num_iterations):
        order = list(range(num_rows))
        if global_batch_size < num_rows:
            order = torch.randperm(num_rows, generator=generator).tolist()
        steps += [order[i : i + global_batch_size] for i in range(0, num_rows, global_batch_size)]
    return steps


def shard_rows(
    rows: Sequence[int], lengths: Sequence[int] | Tensor, *, num_shards: int
) -> list[list[int]]:
    """Data-parallel shards: equal numbers of rows (one apart at most), balanced numbers of tokens.

    Rows are dealt in rounds, longest first; in each round the shard with the fewest tokens takes
    the longest row. Token totals then differ by no more than the longest row. Deterministic, so
    that every rank computes the same shards.

    Args:
        rows: row numbers of one optimizer step.
        lengths: [N] tokens, indexed by row number.
        num_shards: data-parallel size.
    """
    longest_first = _longest_first(rows, lengths)
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    tokens = [0] * num_shards
    for start in range(0, len(longest_first), num_shards):
        emptiest_first = sorted(range(num_shards), key=tokens.__getitem__)
        # The last round may have fewer rows than there are shards: those with most tokens sit out.
        for row, shard in zip(
            longest_first[start : start + num_shards], emptiest_first, strict=False
        ):
            shards[shard].append(row)
            tokens[shard] += int(lengths[row])
    return shards


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int] | Tensor,
    *,
    micro_batch_size: int,
    max_tokens: int | None,
) -> list[list[int]]:
    """Cuts the rows of one shard into forward passes, each row in exactly one.

    Args:
        rows: row numbers of one shard.
        lengths: [N] tokens, indexed by row number.
        micro_batch_size: rows a forward pass; rows of similar length go together.
        max_tokens: tokens a forward pass, first-fit decreasing; when set, it decides instead.

    Raises:
        ValueError: a row alone is longer than `max_tokens`.
    """
    longest_first = _longest_first(rows, lengths)
    if max_tokens is None:
        return [
            longest_first[i : i + micro_batch_size]
            for i in range(0, len(longest_first), micro_batch_size)
        ]
    if longest_first and int(lengths[longest_first[0]]) > max_tokens:
        longest = int(lengths[longest_first[0]])
        raise ValueError(
            f"a prompt and its completion have {longest} tokens, more than a micro-batch may hold "
            f"(policy.max_tokens_per_micro_batch = {max_tokens}): raise that to at least "
            f"{longest}, or lower data.max_prompt_length or rollout.max_completion_length"
        )
    bins: list[list[int]] = []
    free: list[int] = []
    for row in longest_first:
        length = int(lengths[row])
        for i, room in enumerate(free):
            if length <= room:
                bins[i].append(row)
                free[i] -= length
                break
        else:
            bins.append([row])
            free.append(max_tokens - length)
    return bins


def _longest_first(rows: Sequence[int], lengths: Sequence[int] | Tensor) -> list[int]:
    """`rows` by falling length, ties by row number, so that the order of `rows` is irrelevant."""
    return sorted(rows, key=lambda row: (-int(lengths[row]), row))


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """B sequences end to end, T tokens; every [T] field belongs to the predicting position."""

    input_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[T] int64, from 0 within each sequence."""
    cu_seqlens: Tensor
    """[B + 1] int32, where sequences start and the last one ends: cu_seqlens[-1] = T."""
    max_seqlen: int
    """Tokens of the longest sequence, the filling at the end included."""
    targets: Tensor
    """[T] int64, the token that each position predicts; 0 at the end of a sequence."""
    loss_mask: Tensor
    """[T] bool, True where the predicted token is trained on."""
    weights: Tensor
    """[T] float32, from `loss_weights`, 0 where masked."""
    advantages: Tensor
    """[T] float32, 0 where masked."""
    rollout_logprobs: Tensor
    """[T] float32, 0 where masked."""
    ref_logprobs: Tensor | None
    """[T] float32, 0 where masked."""
    old_logprobs: Tensor | None
    """[T] float32, 0 where masked."""
    high_covariance: Tensor | None = None
    """[T] bool, from `tokens_of_high_covariance`."""

    def to(self, device: torch.device | str) -> PackedMicroBatch:
        """The same micro-batch with its tensors on `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.to(device)
        return replace(self, **moved)


def pack(
    batch: TrainBatch,
    rows: Sequence[int],
    weights_NS: Tensor,
    *,
    multiple_of: int = 1,
    sequence_multiple_of: int = 1,
    total_tokens: int | None = None,
) -> PackedMicroBatch:
    """Concatenates `rows` of `batch` without their padding.

    The tail is filled with tokens 0 up to a multiple of `multiple_of` (sequence parallelism splits
    T evenly over ranks) or up to `total_tokens` (pipeline stages that exchange tensors of one
    shape). The filling is a sequence of its own: no real token attends to it, it trains nothing.

    Args:
        batch: N rows, on CPU.
        rows: row numbers of one micro-batch, at least one.
        weights_NS: [N, S] float32, aligned with `batch`, from `loss_weights`.
        multiple_of: T is a multiple of this.
        sequence_multiple_of: so is every sequence's length of this one (context parallelism cuts
            sequences into chunks), filled at its end with tokens 0, which train nothing; it
            divides `multiple_of` and `total_tokens`.
        total_tokens: T itself; None takes the smallest possible.

    Raises:
        ValueError: the rows do not fit into `total_tokens`, or that is not a multiple.
    """
    index_B = torch.as_tensor(rows, dtype=torch.int64)
    lengths_B = batch.lengths[index_B]
    filled_B = lengths_B + -lengths_B % sequence_multiple_of
    beyond = max(0, int(filled_B.max()) - batch.input_ids.shape[1])
    positions_S = torch.arange(batch.input_ids.shape[1] + beyond)
    valid_BS = positions_S < filled_B[:, None]
    predicting_BS = positions_S < lengths_B[:, None] - 1
    fill = _num_filling_tokens(int(filled_B.sum()), multiple_of, total_tokens)
    lengths = [*filled_B.tolist(), *([fill] if fill else [])]
    input_ids_BS = pad(batch.input_ids[index_B], (0, beyond))
    input_ids_BS = input_ids_BS.masked_fill(positions_S >= lengths_B[:, None], 0)

    def shift(values_NS: Tensor) -> Tensor:
        """[N, S] at own positions -> [T] at predicting positions."""
        shifted_BS = pad(values_NS[index_B, 1:], (0, 1 + beyond))
        return pad(shifted_BS.masked_fill(~predicting_BS, 0)[valid_BS], (0, fill))

    return PackedMicroBatch(
        input_ids=pad(input_ids_BS[valid_BS], (0, fill)),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),
        max_seqlen=max(lengths),
        targets=shift(batch.input_ids),
        loss_mask=shift(batch.completion_mask),
        weights=shift(weights_NS),
        advantages=shift(batch.advantages),
        rollout_logprobs=shift(batch.rollout_logprobs),
        ref_logprobs=None if batch.ref_logprobs is None else shift(batch.ref_logprobs),
        old_logprobs=None if batch.old_logprobs is None else shift(batch.old_logprobs),
        high_covariance=None if batch.high_covariance is None else shift(batch.high_covariance),
    )


def _num_filling_tokens(num_tokens: int, multiple_of: int, total_tokens: int | None) -> int:
    if total_tokens is None:
        return -num_tokens % multiple_of
    if total_tokens < num_tokens or total_tokens % multiple_of:
        raise ValueError(
            f"a micro-batch of {num_tokens} tokens cannot be filled up to {total_tokens} tokens: "
            f"that must be as many or more, and a multiple of {multiple_of}"
        )
    return total_tokens - num_tokens


def unpack_logprobs(
    values_T: Tensor, packed: PackedMicroBatch, out_NS: Tensor, rows: Sequence[int]
) -> None:
    """Writes packed values back into rows of `out_NS`, each at the token it belongs to.

    The inverse of `pack` for one [N, S] tensor, in place; 0 where `loss_mask` is False.

    Args:
        values_T: [T], at predicting positions.
        packed: the micro-batch they were computed from.
        out_NS: [N, S], aligned with the `TrainBatch`; other rows are left as they are.
        rows: what `packed` was packed from.
    """
    masked_T = torch.where(packed.loss_mask, values_T.detach(), 0).to(out_NS)
    starts = packed.cu_seqlens.tolist()
    # Without strict: the filling has a sequence, but no row.
    for row, start, end in zip(rows, starts, starts[1:], strict=False):
        out_NS[row] = 0
        end = min(end, start + out_NS.shape[1])  # beyond is what `sequence_multiple_of` filled
        out_NS[row, 1 : end - start] = masked_T[start : end - 1]
