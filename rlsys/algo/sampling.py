"""The distribution that completions are sampled from: temperature, cuts, penalties, known tokens.

The rollout engine samples from `softmax(logits / temperature)` over some tokens only, so the
policy's log-probs are over the same tokens. Otherwise each would be off by the log of the mass that
was cut. The order is vLLM's: ids beyond the tokenizer go, logits get their penalties
(`rlsys/algo/penalties.py`), tokens below `min_p` times the likeliest go, then all but the `top_k`
likeliest, then the least likely ones as long as the others keep a mass of `top_p`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_BISECTIONS = 32
_RANGE_NATS = 64.0
"""Tokens that are less likely than the likeliest by more than this have no mass in float32."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings of sampling."""

    temperature: float = 1.0
    """Divides the logits."""
    top_k: int = 0
    """Number of likeliest tokens that are kept; 0 keeps all."""
    top_p: float = 1.0
    """Mass of the likeliest tokens that are kept; 1 keeps all."""
    num_token_ids: int | None = None
    """Ids from here on only fill up the vocabulary and decode to nothing; None: all decode."""
    min_p: float = 0.0
    """Least probability of a token that is kept, as a share of the likeliest token's; 0 keeps all
    (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Neutral at 1, 0 and 0: see `rlsys.algo.penalties`."""

    @property
    def truncates(self) -> bool:
        """Whether the least likely tokens cannot be sampled."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens before them."""
        neutral = (1.0, 0.0, 0.0)
        own = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return own != neutral


@dataclass(frozen=True, slots=True)
class VocabSlice:
    """The part of the vocabulary that this rank has."""

    start: int = 0
    """Token id of its first column."""
    group: dist.ProcessGroup | None = None
    """The tensor-parallel ranks that share the vocabulary; None: this rank has all of it."""

    def columns(self, targets_T: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """[T] columns of the targets in a slice of `size`, [T] bool: whether this rank has them.

        The column of a target that another rank has is 0.
        """
        local_T = targets_T - self.start
        if self.group is None:
            return local_T, torch.ones_like(local_T, dtype=torch.bool)
        is_local_T = (local_T >= 0) & (local_T < size)
        return local_T.masked_fill(~is_local_T, 0), is_local_T

    def all_reduce_(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Reduce over the ranks that share the vocabulary, in place."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values


WHOLE_VOCABULARY = VocabSlice()


def leave_out_(
    logits_TV: Tensor,
    targets_T: Tensor,
    sampling: Sampling,
    vocab: VocabSlice,
    floor_T: Tensor | None = None,
) -> Tensor | None:
    """Set the logits of tokens that cannot be sampled to -inf, in place.

    The target stays: it was sampled, and where engine and trainer round differently it may be the
    first token that only one of them leaves out.

    Args:
        logits_TV: [T, V] of this rank's slice.
        targets_T: [T] token ids of the whole vocabulary.
        sampling: says which tokens stay.
        vocab: this rank's slice.
        floor_T: the result of an earlier call for the same logits.

    Returns:
        [T] the smallest logit that min_p, top_k and top_p keep; None without them.
    """
    if not sampling.truncates and sampling.num_token_ids is None:
        return None
    columns_T, is_local_T = vocab.columns(targets_T, logits_TV.shape[1])
    columns_T1 = columns_T[:, None]
    sampled_T1 = logits_TV.gather(-1, columns_T1)
    if sampling.num_token_ids is not None:
        logits_TV[:, max(0, sampling.num_token_ids - vocab.start) :] = -torch.inf
    if sampling.truncates:
        if floor_T is None:
            floor_T = _floor(logits_TV, sampling, vocab)
        logits_TV.masked_fill_(logits_TV < floor_T[:, None], -torch.inf)
    kept_T1 = logits_TV.gather(-1, columns_T1)
    logits_TV.scatter_(-1, columns_T1, torch.where(is_local_T[:, None], sampled_T1, kept_T1))
    return floor_T


def _floor(logits_TV: Tensor, sampling: Sampling, vocab: VocabSlice) -> Tensor:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    floor_T = torch.full(logits_TV.shape[:1], -torch.inf, dtype=wide, device=logits_TV.device)
    if sampling.top_k:
        floor_T = _kth_largest(logits_TV, sampling.top_k, vocab.group).to(wide)
    if sampling.min_p:
        max_T = vocab.all_reduce_(logits_TV.amax(dim=-1).to(wide), dist.ReduceOp.MAX)
        # p >= min_p * p_max, as logits; the norm of the softmax cancels.
        floor_T = torch.maximum(floor_T, max_T + sampling.temperature * math.log(sampling.min_p))
    if sampling.top_p < 1.0:
        floor_T = _nucleus_floor(logits_TV, sampling, floor_T, vocab)
    return floor_T


def _kth_largest(logits_TV: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    largest_TK = logits_TV.topk(min(k, logits_TV.shape[1])).values
    if group is not None:
        parts = [torch.empty_like(largest_TK) for _ in range(group.size())]
        dist.all_gather(parts, largest_TK.contiguous(), group=group)
        merged = torch.cat(parts, dim=1)
        largest_TK = merged.topk(min(k, merged.shape[1])).values
    return largest_TK[:, -1]


def _nucleus_floor(
    logits_TV: Tensor, sampling: Sampling, floor_T: Tensor, vocab: VocabSlice
) -> Tensor:
    """By bisection, which needs no sorted copy of the logits and works over ranks.

    A token stays if the tokens above it have less than `top_p` of the mass. So the floor is the
    largest number above which there is at least that much.
    """
    temperature = sampling.temperature
    max_T = vocab.all_reduce_(logits_TV.amax(dim=-1).to(floor_T.dtype), dist.ReduceOp.MAX)

    def mass_above(bound_T: Tensor) -> Tensor:
        mass_T = fused(_mass_above, logits_TV, max_T, bound_T, temperature)
        return vocab.all_reduce_(mass_T, dist.ReduceOp.SUM)

    # `floor_T` itself stays, so the bound is the number right below it.
    below_T = torch.nextafter(floor_T, torch.full_like(floor_T, -torch.inf))
    low_T = torch.maximum(max_T - _RANGE_NATS * temperature, below_T)
    high_T = max_T.clone()
    wanted_T = sampling.top_p * mass_above(low_T)
    for _ in range(_BISECTIONS):
        middle_T = (low_T + high_T) / 2
        is_enough_T = mass_above(middle_T) >= wanted_T
        low_T = torch.where(is_enough_T, middle_T, low_T)
        high_T = torch.where(is_enough_T, high_T, middle_T)
    return torch.nextafter(low_T, torch.full_like(low_T, torch.inf))


def _mass_above(logits_TV: Tensor, max_T: Tensor, bound_T: Tensor, temperature: float) -> Tensor:
    """[T] sum of exp(z - max) over logits above the bound."""
    wide_TV = logits_TV.to(max_T.dtype)
    mass_TV = ((wide_TV - max_T[:, None]) / temperature).exp()
    return torch.where(wide_TV > bound_T[:, None], mass_TV, 0.0).sum(dim=-1)


_compiled = functools.cache(torch.compile)

CPU_BLOCK = 2**18
"""Numbers of the rows that go through a chain of ops together on CPU: as many as a cache holds."""


def fused(function: Callable[..., Any], logits_TV: Tensor, *args: Any) -> Any:
    """Run a chain of element-wise ops and sums over [T, V], whose every row is for itself.

    Op by op, each would read and write the whole tensor in float32, which took two fifths of an
    update of a 1.5B model. Off the CPU the chain is compiled to one kernel. The vocabulary is a
    constant of the kernel: only then does the compiler know that rows are aligned, and reads more
    than a number at a time. On CPU compiling takes longer than it saves: there the chain runs for
    as many rows at a time as stay in the cache.

    Args:
        function: takes the logits and `args`, returns one tensor or several, a row for each row.
        args: numbers, and tensors [T], of which the function gets its rows' part.
    """
    if logits_TV.device.type != "cpu":
        return _compiled(function)(logits_TV, *args)
    num_rows, size = len(logits_TV), max(1, CPU_BLOCK // logits_TV.shape[1])
    if num_rows <= size:
        return function(logits_TV, *args)
    wholes: list[Tensor] = []
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        own = (value[rows] if torch.is_tensor(value) else value for value in args)
        results = function(logits_TV[rows], *own)
        results = (results,) if torch.is_tensor(results) else results
        if not wholes:
            wholes = [part.new_empty(num_rows, *part.shape[1:]) for part in results]
        for whole, part in zip(wholes, results, strict=True):
            whole[rows] = part
    return wholes[0] if len(wholes) == 1 else tuple(wholes)
