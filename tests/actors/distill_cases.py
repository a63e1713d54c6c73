"""Students and teachers of a few kilobytes, and their divergence by transformers."""

from __future__ import annotations

from copy import copy

import torch
from one_rank import _start
from policy_cases import gradients_of
from test_sft_policy import SAMPLES
from torch.nn.functional import kl_div, log_softmax

from rlsys.config.distill import DistillConfig
from rlsys.types import TrainBatch


def distill_config(student, teacher, distill=None, ranks=None, **policy):
    """A student that updates on 8 samples, in micro-batches of 3."""
    return DistillConfig.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 8,
            "data": {"dataset": ["unused"], "max_length": 40},
            "model": {"path": str(student)},
            "teacher": {"path": str(teacher), "placement": "own", **(ranks or {})},
            "distill": distill or {},
            # Sharded optimizers leave each rank with the sum of its part of the gradient only.
            "policy": {
                "global_batch_size": 8,
                "micro_batch_size": 3,
                "use_distributed_optimizer": False,
                **policy,
            },
        }
    )


def divergence_of(log_p, log_q, beta):
    """[T] as the paper writes it."""
    if beta == 0:
        return kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    log_m = ((1 - beta) * log_p.exp() + beta * log_q.exp()).log()
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)


def loss_of_transformers(student, teacher, samples, *, beta=0.5, temperature=1.0, loss_top_k=0):
    """The mean over all tokens that are trained on, sample by sample."""
    total, count = 0.0, 0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()[None]
        trained = torch.from_numpy(sample.target_mask)[1:]
        with torch.no_grad():
            of_teacher = teacher(ids).logits[0, :-1][trained]
        of_student = student(ids).logits[0, :-1][trained]
        shared = min(of_student.shape[1], of_teacher.shape[1])
        log_p, log_q = (
            log_softmax(logits[:, :shared] / temperature, dim=-1)
            for logits in (of_student, of_teacher)
        )
        if loss_top_k:
            log_q, top = log_q.topk(loss_top_k)
            log_p = log_p.gather(-1, top)
            log_p, log_q = (
                torch.cat([known, (1 - known.exp().sum(-1, keepdim=True)).log()], dim=-1)
                for known in (log_p, log_q)
            )
        total = total + divergence_of(log_p, log_q, beta).sum()
        count += len(log_p)
    return total / count


def with_teacher(batch, config) -> TrainBatch:
    """The batch as the driver sends it, by a teacher in this process."""
    from rlsys.algo.teacher_rows import join_rows
    from rlsys.engines.megatron.reference import MegatronTeacher

    teacher = MegatronTeacher(config, device="cpu")
    found = teacher.describe_tokens(batch)
    batch.teacher = join_rows([found], len(batch.lengths))
    return batch


def learn(student, teacher, distill, cut):
    """The gradient of one optimizer step, and its metrics; in a process of its own."""
    _start()
    from rlsys.algo.batching import build_sample_batch
    from rlsys.engines.megatron.policy import MegatronPolicy

    config = distill_config(student, teacher, distill, **cut)
    batch = with_teacher(build_sample_batch(SAMPLES), config)
    policy = MegatronPolicy(config, device="cpu")
    policy.optimizer.step = lambda: (True, 0.0, None)
    metrics = policy.update(batch).metrics
    gradients = copy(policy.weights)
    gradients._parameters = gradients_of(policy.weights)
    return {name: grad.clone() for name, grad in gradients.export()}, metrics
