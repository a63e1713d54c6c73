"""Students and teachers of a few kilobytes, and their divergence by transformers."""

from __future__ import annotations

from copy import copy

import torch
from one_rank import start
from policy_cases import gradients_of
from test_sft_policy import SAMPLES
from torch.nn.functional import kl_div, log_softmax

from rlsys.algo.batching import build_sample_batch
from rlsys.algo.teacher_rows import join_rows
from rlsys.config.distill import DistillConfig
from rlsys.files import write_jsonl
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
            "distill": {"lmbda": 0.0, **(distill or {})},
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
    from rlsys.engines.megatron.reference import MegatronTeacher

    teacher = MegatronTeacher(config, device="cpu")
    found = teacher.describe_tokens(batch)
    batch.teacher = join_rows([found], len(batch.lengths))
    return batch


def learn(student, teacher, distill, cut):
    """The gradient of one optimizer step, and its metrics; in a process of its own."""
    start()
    from rlsys.engines.megatron.policy import MegatronPolicy

    config = distill_config(student, teacher, distill, **cut)
    batch = with_teacher(build_sample_batch(SAMPLES), config)
    policy = MegatronPolicy(config, device="cpu")
    policy.optimizer.step = lambda: (True, 0.0, None)
    metrics = policy.update(batch).metrics
    gradients = copy(policy.weights)
    gradients._parameters = gradients_of(policy.weights)
    return {name: grad.clone() for name, grad in gradients.export()}, metrics


def question(number):
    """A conversation of which the last digit says the answer."""
    answer = f"It is {'odd' if number % 2 else 'even'}."
    return {
        "messages": [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": answer},
        ]
    }


def learn_parity(data, folder, steps):
    """Train a teacher on questions, and students of half its size by what it says of the answers.

    Args:
        data: folder with the untrained models `teacher` and `student`.
        folder: to write rows and the teacher to.
        steps: of each training.

    Returns:
        (loss, accuracy) on held-out answers, of the teacher, of the untrained student, and of
        students by the settings of distill.
    """
    start()
    from transformers import AutoTokenizer

    from rlsys.config import SftConfig
    from rlsys.data.samples import SampleRules, load_samples
    from rlsys.data.streams.make import make_sample_stream
    from rlsys.engines.megatron.policy import MegatronPolicy
    from rlsys.engines.megatron.reference import MegatronTeacher

    write_jsonl(folder / "train.jsonl", map(question, range(0, 1000, 3)))
    write_jsonl(folder / "validation.jsonl", map(question, range(1, 1000, 17)))
    values = {
        "output_dir": "unused",
        "max_steps": steps,
        "data": {
            "dataset": [str(folder / "train.jsonl")],
            "val_dataset": [str(folder / "validation.jsonl")],
            "max_length": 64,
        },
        "model": {"path": str(data / "teacher")},
        "policy": {"global_batch_size": 16, "micro_batch_size": 16, "lr": 2e-3},
    }
    sft = SftConfig.model_validate(values)
    tokenizer = AutoTokenizer.from_pretrained(data / "teacher")
    samples = load_samples(sft.data, tokenizer, SampleRules.of(sft), seed=0)
    held_out = build_sample_batch(samples.validation)

    def score(policy):
        rows, (logprobs, likeliest) = policy.compute_logprobs(
            held_out, ("logprobs", "is_likeliest")
        )
        mask = held_out.completion_mask[rows]
        return -logprobs[mask].mean().item(), likeliest[mask].mean().item()

    def train(config, teacher=None):
        policy, stream = MegatronPolicy(config, device="cpu"), make_sample_stream(config, samples)
        first = score(policy)
        for _ in range(steps):
            batch = build_sample_batch(stream.take(16))
            if teacher is not None:
                found = teacher.describe_tokens(batch)
                batch.teacher = join_rows([found], len(batch.lengths))
            policy.update(batch)
        return policy, first

    trained, _ = train(sft)
    trained.save_model(folder / "trained")
    scores = {"teacher": score(trained)}
    for distill in ({"beta": 0.0}, {"beta": 0.5}, {"beta": 0.0, "loss_top_k": 4}):
        config = DistillConfig.model_validate(
            values
            | {
                "model": {"path": str(data / "student")},
                "teacher": {"path": str(folder / "trained"), "placement": "own"},
                "distill": distill | {"lmbda": 0.0},
            }
        )
        student, scores["untrained"] = train(config, MegatronTeacher(config, device="cpu"))
        scores[str(distill)] = score(student)
    return scores
