"""The tokens of completions: ids, log-probs and advantages, as one Parquet file a step.

Numbers of a column lie together in Parquet and are compressed with zstd, floats byte by byte
(BYTE_STREAM_SPLIT). Nothing is rounded: the mismatch of policy and engine is in the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlsys.files import replacing
from rlsys.run.folder import RunDir
from rlsys.tracking.base import Tracker
from rlsys.types import RolloutGroup, TrainBatch

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor

_FLOATS = ("rollout_logprobs", "logprobs", "advantages")


class TokensTracker(Tracker):
    """tokens/step-N.parquet: a row for each training completion of step N."""

    def __init__(self, run_dir: RunDir):
        self._run_dir = run_dir

    def log_tokens(self, step: int, groups: Sequence[RolloutGroup], batch: TrainBatch) -> None:
        """Write the file of a step."""
        from pyarrow import parquet

        path = tokens_path(self._run_dir, step)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with replacing(path) as scratch:
            parquet.write_table(
                tokens_table(groups, batch),
                scratch,
                compression="zstd",
                compression_level=1,
                use_dictionary=["advantages.list.element"],
                column_encoding={
                    f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _FLOATS[:2]
                },
            )

    def close(self) -> None:
        """Nothing is open."""


def tokens_path(run_dir: RunDir, step: int) -> Path:
    """The file of a step."""
    return run_dir.tokens / f"step-{step:06d}.parquet"


def drop_tokens_after(run_dir: RunDir, step: int) -> None:
    """Delete the files of later steps, before a run continues after `step`."""
    for path in run_dir.tokens.glob("step-*.parquet"):
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()


def tokens_table(groups: Sequence[RolloutGroup], batch: TrainBatch) -> pyarrow.Table:
    """A row for each of the N completions of a batch, with lists over its T tokens.

    Args:
        groups: the batch was built from them.
        batch: with advantages, and with old_logprobs where the policy computed its own.
    """
    import pyarrow  # commands that only read a config load neither
    import torch

    prompts_N = torch.tensor([len(g.prompt.token_ids) for g in groups for _ in g.completions])
    place_S = torch.arange(batch.input_ids.shape[1])
    # Not completion_mask: that of a completion which was left out of the loss is empty.
    is_sampled_NS = (place_S >= prompts_N[:, None]) & (place_S < batch.lengths[:, None])
    counts_N = is_sampled_NS.sum(dim=1).numpy()
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(counts_N)]).astype(np.int32))

    def lists(values_NS: Tensor, dtype: type[np.generic]) -> pyarrow.ListArray:
        flat: NDArray[np.generic] = values_NS[is_sampled_NS].numpy().astype(dtype)
        return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(flat))

    numbers = [(g.group_id, index) for g in groups for index in range(len(g.completions))]
    columns = {
        "group_id": pyarrow.array([group_id for group_id, _ in numbers], pyarrow.int64()),
        "index": pyarrow.array([index for _, index in numbers], pyarrow.int64()),
        "token_ids": lists(batch.input_ids, np.int32),
        "rollout_logprobs": lists(batch.rollout_logprobs, np.float32),
        "advantages": lists(batch.advantages, np.float32),
    }
    own = batch.old_logprobs
    if own is not None and own is not batch.rollout_logprobs:
        columns["logprobs"] = lists(own, np.float32)
    return pyarrow.table(columns)
