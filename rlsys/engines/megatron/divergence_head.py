"""Distillation at the end of a model: the student's divergence, and what the teacher gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from rlsys.algo.distributions import Divergence, TeacherTop, teacher_top
from rlsys.algo.divergence import TeacherHidden, chunked_divergence
from rlsys.algo.logprobs import TokenValues
from rlsys.engines.megatron.hf_folder import SafetensorsReader
from rlsys.engines.out_of_memory import out_of_memory_explained
from rlsys.model.families.base import HF_EMBEDDING, HF_OUTPUT
from rlsys.model.folder import resolve_model_path
from rlsys.model.shape import read_model_shape

if TYPE_CHECKING:
    from rlsys.algo.batching import PackedMicroBatch
    from rlsys.config import RunConfig
    from rlsys.engines.megatron.build import LogprobHead


def shared_divergence(config: RunConfig) -> Divergence:
    """The divergence of a run, over the token ids that policy and teacher both have.

    Models with the same tokenizer fill their vocabulary up to different sizes.
    """
    assert config.divergence is not None
    assert config.teacher_path is not None
    sizes = [
        read_model_shape(resolve_model_path(path), may_bridge=True).vocab_size
        for path in (config.model.path, config.teacher_path)
    ]
    return Divergence(**config.divergence, num_token_ids=min(sizes))


class DivergenceHead:
    """The student's end: the divergence from the teacher where a micro-batch has one.

    It holds the output weight of the teacher, with which the teacher's hidden states become logits
    here: a slice for each tensor-parallel rank, as the student's.

    Args:
        head: the student's own, which computes log-probs where there is no teacher.
        config: of the run.
        dtype, device: of the weight.
    """

    def __init__(
        self,
        head: LogprobHead,
        config: RunConfig,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._head = head
        self._divergence = shared_divergence(config)
        self._weight: torch.Tensor | None = None
        if not config.teacher_top_k:
            with out_of_memory_explained(
                "the teacher's output weight, vocabulary / TP x hidden: raise "
                "policy.tensor_parallel_size, or set distill.loss_top_k"
            ):
                self._weight = self._read_weight(config).to(device, dtype)

    def _read_weight(self, config: RunConfig) -> torch.Tensor:
        """[V, D], the rows of the token ids that this rank has of the student's vocabulary.

        Ids that the teacher lacks have rows of zeros; the divergence leaves them out.
        """
        assert config.teacher_path is not None
        folder = resolve_model_path(config.teacher_path)
        teacher = read_model_shape(folder, may_bridge=True)
        with SafetensorsReader(folder) as reader:
            whole = reader.shard(HF_EMBEDDING if teacher.tied else HF_OUTPUT, None, 0, 1)
        start, size = self._head.vocab.start, self._head.slice_size
        rows = whole[start : start + size]
        return torch.cat([rows, rows.new_zeros(size - len(rows), whole.shape[1])])

    def __call__(
        self, hidden: torch.Tensor, micro_batch: PackedMicroBatch, positions: torch.Tensor
    ) -> TokenValues:
        """As LogprobHead; with a teacher, the values are 0 where nothing is trained on."""
        if micro_batch.teacher_hidden is None and micro_batch.teacher_top_ids is None:
            return self._head(hidden, micro_batch, positions)
        states, weight = self._head.states_and_weight(hidden)
        trained = micro_batch.loss_mask[positions].nonzero().squeeze(-1)
        # The teacher's values come one for each trained token of the whole micro-batch.
        number = (micro_batch.loss_mask.cumsum(0) - 1)[positions[trained]]
        found = chunked_divergence(
            states[trained],
            weight,
            micro_batch.targets[positions[trained]],
            self._teacher(micro_batch, number, weight.dtype),
            divergence=self._divergence,
            vocab=self._head.vocab,
        )
        nothing = states.new_zeros(len(positions), dtype=found.logprobs.dtype)
        return TokenValues(
            *(nothing.index_copy(0, trained, value) for value in found if value is not None)
        )

    def _teacher(
        self, micro_batch: PackedMicroBatch, number: torch.Tensor, dtype: torch.dtype
    ) -> TeacherHidden | TeacherTop:
        if micro_batch.teacher_hidden is not None:
            assert self._weight is not None
            hidden = micro_batch.teacher_hidden[number].to(dtype)
            return TeacherHidden(hidden, self._weight.to(dtype))
        assert micro_batch.teacher_top_ids is not None
        assert micro_batch.teacher_top_logprobs is not None
        return TeacherTop(
            micro_batch.teacher_top_ids[number], micro_batch.teacher_top_logprobs[number]
        )


class TeacherValues(NamedTuple):
    """What a teacher gives of each position: hidden states, or its likeliest tokens."""

    hidden: torch.Tensor | None = None
    """[T, D]"""
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    """[T, K], 0 where nothing is trained on."""


class TeacherHead:
    """The teacher's end, without a gradient.

    Args:
        head: the teacher's own.
        config: of the run.
    """

    def __init__(self, head: LogprobHead, config: RunConfig):
        self._head = head
        self._top_k = config.teacher_top_k
        self._divergence = shared_divergence(config)

    def __call__(
        self, hidden: torch.Tensor, micro_batch: PackedMicroBatch, positions: torch.Tensor
    ) -> TeacherValues:
        """[1, T / sp, D] hidden states of T positions -> what the student needs of them."""
        states, weight = self._head.states_and_weight(hidden)
        if not self._top_k:
            return TeacherValues(hidden=states)
        trained = micro_batch.loss_mask[positions].nonzero().squeeze(-1)
        top = teacher_top(
            states[trained],
            weight,
            self._top_k,
            divergence=self._divergence,
            vocab=self._head.vocab,
        )
        shape = (len(positions), self._top_k)
        ids = top.ids_TK.new_zeros(shape).index_copy(0, trained, top.ids_TK)
        logprobs = top.logprobs_TK.new_zeros(shape).index_copy(0, trained, top.logprobs_TK)
        return TeacherValues(top_ids=ids, top_logprobs=logprobs)
