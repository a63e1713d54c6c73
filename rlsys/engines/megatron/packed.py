"""Where the sequences of a packed micro-batch are: for attention, and for scores."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from rlsys.algo.batching import PackedMicroBatch


def packed_seq_params(micro_batch: PackedMicroBatch, context_parallel_size: int) -> PackedSeqParams:
    """What attention gets of a micro-batch."""
    # Under context parallelism, the same object twice says to Transformer Engine that sequences
    # are not padded: their filling is a part of them that nothing attends to.
    padded = micro_batch.cu_seqlens if context_parallel_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro_batch.cu_seqlens,
        cu_seqlens_kv=micro_batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=micro_batch.max_seqlen,
        max_seqlen_kv=micro_batch.max_seqlen,
    )


def last_tokens(micro_batch: PackedMicroBatch) -> torch.Tensor:
    """[B] the position of the last token of each row of a micro-batch.

    Context parallelism fills sequences up, so their ends need not be their last tokens.
    """
    sequences = micro_batch.is_token.split(micro_batch.cu_seqlens.diff().tolist())
    lengths = torch.stack([is_token.sum() for is_token in sequences])
    ends = micro_batch.cu_seqlens[:-1].long() + lengths - 1
    return ends[: len(micro_batch.rows)]
