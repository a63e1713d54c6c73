"""A process that is a policy of one rank, without Ray, for one model after the other."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import cache


def one_rank():
    """An executor whose process runs the functions of this module."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


@cache
def start():
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
    start()
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


def gradient_and_kept(folder, options):
    """The gradient of one micro-batch, and the bytes that its forward pass kept for it.

    Args:
        options: settings of policy.
    """
    start()
    from policy_cases import gradients_of, policy_config, random_batch
    from torch.autograd.graph import saved_tensors_hooks

    from rlsys.engines.megatron.policy import MegatronPolicy

    policy = MegatronPolicy(policy_config(folder, micro_batch_size=8, **options), device="cpu")
    kept, num_bytes = [], []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    def first_use(tensor):
        if not num_bytes:
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in kept}
            num_bytes.append(sum(storage.nbytes() for storage in storages.values()))
        return tensor

    policy.optimizer.step = lambda: (True, 0.0, None)
    with saved_tensors_hooks(keep, first_use):
        policy.update(random_batch(), loss="sft")
    gradients = {name: grad.clone() for name, grad in gradients_of(policy.weights).items()}
    return gradients, num_bytes[0]


def preference_step(folder, section, options):
    """Gradient, metrics and log-probs of a step of preference training.

    Args:
        options: settings of policy.
    """
    start()
    from policy_cases import gradients_of
    from preference_cases import config_of, make_batch

    from rlsys.engines.megatron.policy import MegatronPolicy

    config = config_of(folder, section, **options)
    policy, batch = MegatronPolicy(config, device="cpu"), make_batch(config)
    _, values = policy.compute_logprobs(batch)
    policy.optimizer.step = lambda: (True, 0.0, None)
    metrics = policy.update(batch).metrics
    gradients = gradients_of(policy.weights)
    return {name: grad.clone() for name, grad in gradients.items()}, metrics, values[0]
