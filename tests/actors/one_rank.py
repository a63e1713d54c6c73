"""A process that is a policy of one rank, without Ray, for one model after the other."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache


def one_rank():
    """An executor whose process runs the functions of this module."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@cache
def _start():
    import torch
    import torch.distributed as dist

    from rlsys.engines.megatron.on_cpu import enable_megatron_on_cpu

    enable_megatron_on_cpu()
    from rlsys.engines.megatron.parallel import ParallelLayout, initialize_parallel

    torch.set_num_threads(1)
    layout = ParallelLayout(rank=0, world_size=1, timeout_s=60)
    initialize_parallel(layout, dist.HashStore(), device="cpu", seed=0)


def logprobs_or_refusal(folder):
    """[N, S] log-probs of `random_batch`, or the text with which the policy refuses the model."""
    _start()
    import torch
    from policy_cases import policy_config, random_batch

    from rlsys.engines.megatron.model import MegatronModel

    batch = random_batch()
    try:
        model = MegatronModel(policy_config(folder), str(folder), device="cpu")
    except ValueError as error:
        return str(error)
    rows, (logprobs, _) = model.compute_logprobs(batch)
    return torch.zeros(batch.input_ids.shape).index_copy(0, torch.tensor(rows), logprobs)
