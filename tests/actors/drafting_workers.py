"""Workers of an engine on CPU whose sampler gives drafts the temperature of their sequence.

vLLM (0.32) fills a copy of the tensor there. vLLM imports this in every process that holds a part
of the model, before it registers its kernels.
"""

import torch
from vllm.utils import cpu_triton_utils

from rlsys.engines.vllm.weight_backend import WeightSyncWorkerExtension

WORKER_EXTENSION = "drafting_workers.DraftingWorker"


def expand(output, values, ends, replace_from, replace_to, most=None):
    """Each of `values` for all tokens of its sequence, which end at `ends`."""
    counts = torch.diff(ends.long(), prepend=torch.zeros(1, dtype=torch.int64))
    values = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    output.copy_(values.repeat_interleave(counts))


cpu_triton_utils._expand_kernel_impl = expand


class DraftingWorker(WeightSyncWorkerExtension):
    """A usual worker; importing this module makes the difference."""
