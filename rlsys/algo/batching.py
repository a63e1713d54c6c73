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

import numpy as np
import torch
from torch.nn.functional import pad

from rlsys.algo.teacher_rows import pack_teacher
from rlsys.types import TrainBatch

if TYPE_CHECKING:
    from torch import Tensor

    from rlsys.types import Completion, RolloutGroup, Sample


def build_train_batch(groups: list[RolloutGroup]) -> TrainBatch:
    """Right-padded rows `prompt + completion` of P groups of G completions, in group order.

    Advantages are 0, and every sampled token is marked, also the EOS token and the tokens of a
    completion that was cut at the length limit; see `weighting.leave_out`.

    Raises:
        ValueError: a prompt has no tokens, so nothing predicts the first token of its completions.
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
        routed_experts=_routed_experts([completion for _, completion in rows], lengths),
    )


def build_sample_batch(samples: Sequence[Sample], *, at_least: int = 1) -> TrainBatch:
    """Right-padded rows of samples, in their order; targets are what is trained on.

    With fewer samples than `at_least`, such as data-parallel ranks, rows without targets follow.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    lengths += [1] * (at_least - len(lengths))
    shape = (len(lengths), max(lengths))
    input_ids = torch.zeros(shape, dtype=torch.int64)  # `pack` drops the padding again
    targets = torch.zeros(shape, dtype=torch.bool)
    for n, (sample, length) in enumerate(zip(samples, lengths, strict=False)):
        input_ids[n, :length] = torch.from_numpy(sample.token_ids)
        targets[n, :length] = torch.from_numpy(sample.target_mask)
    nothing = torch.zeros(1, 1).expand(shape)  # one number in memory: no sample was rewarded
    return TrainBatch(
        input_ids=input_ids,
        lengths=torch.tensor(lengths),
        completion_mask=targets,
        advantages=nothing,
        rollout_logprobs=nothing,
    )


def _routed_experts(
    completions: Sequence[Completion], lengths: Sequence[int]
) -> list[np.ndarray] | None:
    routed = [completion.routed_experts for completion in completions]
    rows = [row for row in routed if row is not None]
    assert len(rows) in (0, len(routed)), "some completions came without their routing"
    for row, length in zip(rows, lengths, strict=False):
        assert len(row) == length - 1, (len(row), length)
    return rows or None


def optimizer_step_rows(
    num_rows: int, *, global_batch_size: int, num_iterations: int, seed: int
) -> list[list[int]]:
    """The rows of each optimizer step of a rollout, `num_iterations` passes over all rows.

    Each pass is a new permutation by `seed`, cut into steps of `global_batch_size`. If one step
    holds all rows, they keep their order, which does not matter within a step.
    """
    assert num_rows % global_batch_size == 0, "config/rules.py checks the batch sizes"
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(num_iterations):
        order = list(range(num_rows))
        if global_batch_size < num_rows:
            order = torch.randperm(num_rows, generator=generator).tolist()
        steps += [order[i : i + global_batch_size] for i in range(0, num_rows, global_batch_size)]
    return steps


def shard_rows(
    rows: Sequence[int],
    lengths: Sequence[int] | Tensor,
    *,
    num_shards: int,
    together: int = 1,
) -> list[list[int]]:
    """Data-parallel shards of an optimizer step's rows, balanced in rows and in tokens.

    Rows are dealt in rounds, longest first; in each round the shard with the fewest tokens takes
    the longest row. Numbers of rows then differ by 1 at most, numbers of tokens by no more than the
    longest row. Deterministic, so that every rank computes the same shards.

    Args:
        rows: row numbers.
        lengths: [N] tokens, indexed by row number.
        num_shards: data-parallel size.
        together: rows that stay in one shard: the first ones, the next, and so on.
    """
    if together > 1:
        units, lengths_U = _units(rows, lengths, together)
        sharded = shard_rows(range(len(units)), lengths_U, num_shards=num_shards)
        return [[row for unit in shard for row in units[unit]] for shard in sharded]
    longest_first = _longest_first(rows, lengths)
    shards: list[list[int]] = [[] for _ in range(num_shards)]
    tokens = [0] * num_shards
    for start in range(0, len(longest_first), num_shards):
        emptiest_first = sorted(range(num_shards), key=tokens.__getitem__)
        dealt = longest_first[start : start + num_shards]
        # If the last round has too few rows, the shards with most tokens sit out.
        for row, shard in zip(dealt, emptiest_first, strict=False):
            shards[shard].append(row)
            tokens[shard] += int(lengths[row])
    return shards


def micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int] | Tensor,
    *,
    micro_batch_size: int,
    max_tokens: int | None,
    together: int = 1,
) -> list[list[int]]:
    """The rows of one shard, cut into forward passes.

    Args:
        rows: row numbers.
        lengths: [N] tokens, indexed by row number.
        micro_batch_size: rows of a forward pass, which are of similar length; with `together`,
            units of so many rows.
        max_tokens: most tokens of a forward pass, first-fit decreasing; wins if set.
        together: see `shard_rows`.
    """
    if together > 1:
        units, lengths_U = _units(rows, lengths, together)
        cut = micro_batches(
            range(len(units)), lengths_U, micro_batch_size=micro_batch_size, max_tokens=max_tokens
        )
        return [[row for unit in some for row in units[unit]] for some in cut]
    longest_first = _longest_first(rows, lengths)
    if max_tokens is None:
        return [
            longest_first[i : i + micro_batch_size]
            for i in range(0, len(longest_first), micro_batch_size)
        ]
    bins: list[list[int]] = []
    free: list[int] = []
    for row in longest_first:
        length = int(lengths[row])
        assert length <= max_tokens, "config/rules.py checks the longest row"
        for i, room in enumerate(free):
            if length <= room:
                bins[i].append(row)
                free[i] -= length
                break
        else:
            bins.append([row])
            free.append(max_tokens - length)
    return bins


def _units(
    rows: Sequence[int], lengths: Sequence[int] | Tensor, together: int
) -> tuple[list[Sequence[int]], list[int]]:
    """The rows in units of `together`, and the tokens of each unit."""
    assert len(rows) % together == 0, "units are whole"
    units = [rows[start : start + together] for start in range(0, len(rows), together)]
    return units, [sum(int(lengths[row]) for row in unit) for unit in units]


def _longest_first(rows: Sequence[int], lengths: Sequence[int] | Tensor) -> list[int]:
    """`rows` by falling length, ties by row number: the order of `rows` does not matter."""
    return sorted(rows, key=lambda row: (-int(lengths[row]), row))


_MAY_BE_NONE = ("ref_logprobs", "old_logprobs", "high_covariance")


@dataclass(frozen=True, slots=True)
class PackedMicroBatch:
    """B sequences end to end, T tokens; every [T] field belongs to the predicting position."""

    input_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[T] int64, from 0 within each sequence."""
    cu_seqlens: Tensor
    """[B + 1] int32, the start of each sequence and the end of the last: cu_seqlens[-1] = T."""
    max_seqlen: int
    """Tokens of the longest sequence; the filling at the end is a sequence, too."""
    targets: Tensor
    """[T] int64, the token that each position predicts; 0 at the end of a sequence."""
    loss_mask: Tensor
    """[T] bool, True where the predicted token is trained on."""
    is_token: Tensor
    """[T] bool, False on filling."""
    is_routed: Tensor
    """[T] bool, where the rollout engine chose experts: False on filling and on the last token of
    each row."""
    weights: Tensor
    """[T] float32, from `loss_weights`, 0 where masked."""
    advantages: Tensor
    """[T] float32, 0 where masked."""
    rollout_logprobs: Tensor
    ref_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    """Each [T] float32, 0 where masked."""
    high_covariance: Tensor | None = None
    """[T] bool, from `tokens_of_high_covariance`."""
    routed_experts: Tensor | None = None
    """[T, layers, top_k] uint8 or int16, the experts to replay where `is_routed`."""
    teacher_hidden: Tensor | None = None
    """[L, D] of the L tokens of `loss_mask` in their order, see `TeacherRows`."""
    teacher_top_ids: Tensor | None = None
    teacher_top_logprobs: Tensor | None = None
    """[L, K]"""
    rows: tuple[int, ...] = ()
    """[B] the rows of the batch that the sequences are; the filling at the end is none."""
    is_chosen: Tensor | None = None
    ref_logps: Tensor | None = None
    """[B] those of `rows`, see `TrainBatch`."""
    kl: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedMicroBatch:
        """The same micro-batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in values.items() if torch.is_tensor(value)
        }
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

    Tokens 0 fill up the end to a multiple of `multiple_of` or to `total_tokens`. This filling is a
    sequence of its own: no real token attends to it, and it trains nothing.

    Args:
        batch: N rows, on CPU.
        rows: row numbers of one micro-batch, at least one.
        weights_NS: [N, S] float32, aligned with `batch`, from `loss_weights`.
        multiple_of: T is a multiple of this, because sequence parallelism splits T over ranks.
        sequence_multiple_of: every sequence is filled up with tokens 0 to a multiple of this,
            because context parallelism cuts it into chunks; divides `multiple_of`.
        total_tokens: T, if pipeline stages need it equal; None is the smallest T.

    Raises:
        ValueError: the rows do not fit into `total_tokens`, or it is not a multiple.
    """
    index_B = torch.as_tensor(rows, dtype=torch.int64)
    lengths_B = batch.lengths[index_B]
    filled_B = lengths_B + -lengths_B % sequence_multiple_of
    beyond = max(0, int(filled_B.max()) - batch.input_ids.shape[1])
    positions_S = torch.arange(batch.input_ids.shape[1] + beyond)
    valid_BS = positions_S < filled_B[:, None]
    fill = _num_filling_tokens(int(filled_B.sum()), multiple_of, total_tokens)
    lengths = [*filled_B.tolist(), *([fill] if fill else [])]

    def concatenate(values_NS: Tensor, first: int) -> Tensor:
        """[N, S] -> [T]: the values from column `first` on, 0 at the end of each sequence."""
        values_BS = pad(values_NS[index_B, first:], (0, first + beyond))
        values_BS = values_BS.masked_fill(positions_S >= lengths_B[:, None] - first, 0)
        return pad(values_BS[valid_BS], (0, fill))

    ones_NS = torch.ones_like(batch.completion_mask)
    optional = {n: concatenate(v, 1) for n in _MAY_BE_NONE if (v := getattr(batch, n)) is not None}
    optional |= _of_rows(batch, index_B) | pack_teacher(batch, rows)
    return PackedMicroBatch(
        input_ids=concatenate(batch.input_ids, first=0),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(),
        max_seqlen=max(lengths),
        targets=concatenate(batch.input_ids, first=1),
        loss_mask=concatenate(batch.completion_mask, first=1),
        is_token=concatenate(ones_NS, first=0),
        is_routed=concatenate(ones_NS, first=1),
        weights=concatenate(weights_NS, first=1),
        advantages=concatenate(batch.advantages, first=1),
        rollout_logprobs=concatenate(batch.rollout_logprobs, first=1),
        routed_experts=_pack_routing(batch, rows, lengths),
        rows=tuple(rows),
        **optional,
    )


def _of_rows(batch: TrainBatch, index_B: Tensor) -> dict[str, Tensor]:
    """What a preference loss knows of the rows."""
    known = {"is_chosen": batch.is_chosen, "ref_logps": batch.ref_logps}
    own = {name: values[index_B] for name, values in known.items() if values is not None}
    return own if batch.kl is None else own | {"kl": batch.kl}


def _pack_routing(batch: TrainBatch, rows: Sequence[int], lengths: Sequence[int]) -> Tensor | None:
    """[T, layers, top_k], 0 where there is no choice; sequences have `lengths` tokens."""
    if batch.routed_experts is None:
        return None
    first = batch.routed_experts[rows[0]]
    routed = np.zeros((sum(lengths), *first.shape[1:]), dtype=first.dtype)
    start = 0
    # Not strict: the filling is a sequence without a row.
    for row, length in zip(rows, lengths, strict=False):
        own = batch.routed_experts[row]
        routed[start : start + len(own)] = own
        start += length
    return torch.from_numpy(routed)


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
    """Writes packed values back into `rows` of `out_NS`, each at the token it belongs to.

    The inverse of `pack` for one [N, S] tensor, in place; 0 where `loss_mask` is False.

    Args:
        values_T: [T], at predicting positions.
        packed: the micro-batch of these values.
        out_NS: [N, S], aligned with the `TrainBatch`; its other rows do not change.
        rows: the rows that `packed` was packed from.
    """
    masked_T = torch.where(packed.loss_mask, values_T.detach(), 0).to(out_NS)
    starts = packed.cu_seqlens.tolist()
    # Not strict: the filling is a sequence without a row.
    for row, start, end in zip(rows, starts, starts[1:], strict=False):
        out_NS[row] = 0
        end = min(end, start + out_NS.shape[1])  # `sequence_multiple_of` filled the rest
        out_NS[row, 1 : end - start] = masked_T[start : end - 1]
