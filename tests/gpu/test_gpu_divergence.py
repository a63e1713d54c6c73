"""The divergence from a teacher on a GPU, against the formula in float64; gradients too."""

import pytest
import torch
from distill_cases import divergence_of
from gpu_cases import gpu_config
from torch.nn.functional import linear

from rlsys.algo.distributions import Divergence, teacher_top
from rlsys.algo.divergence import TeacherHidden, chunked_divergence

pytestmark = pytest.mark.gpu(1)

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 300, 4_160, 64, 96
PADDING = 6
"""Ids at the end that only one of the models has."""
TEMPERATURE = 0.8
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-6}
"""Error of a value or gradient, relative to the largest: bfloat16 also rounds the logits."""


def formula(student, teacher, upstream, beta, top):
    """Divergences, over tokens `top` and the rest or over all, and gradients, in float64."""
    student = [tensor.double().requires_grad_() for tensor in student]
    log_p, log_q = (
        (linear(*both)[:, :-PADDING] / TEMPERATURE).log_softmax(-1)
        for both in (student, [tensor.double() for tensor in teacher])
    )
    if top is not None:
        log_p, log_q = (
            torch.cat([known, (-known.exp().sum(-1, keepdim=True)).log1p()], dim=-1)
            for known in (log_p.gather(-1, top), log_q.gather(-1, top))
        )
    values = divergence_of(log_p, log_q, beta)
    return values.detach(), torch.autograd.grad((upstream * values).sum(), student)


def errors(rank, dtype, beta, k):
    """On a rank: largest errors of values and gradients."""
    device, rng = rank.engine.device, torch.Generator().manual_seed(k)

    def random(*shape, scale=1.0):
        values = scale * torch.randn(shape, generator=rng)
        return values.to(device, getattr(torch, dtype))

    student = random(TOKENS, HIDDEN), random(VOCAB, HIDDEN, scale=0.2)
    teacher = random(TOKENS, TEACHER_HIDDEN), random(VOCAB, TEACHER_HIDDEN, scale=0.2)
    targets = torch.randint(0, VOCAB - PADDING, (TOKENS,), generator=rng).to(device)
    upstream = torch.randn(TOKENS, generator=rng).to(device)

    divergence = Divergence(beta, TEMPERATURE, num_token_ids=VOCAB - PADDING)
    given, top = TeacherHidden(*teacher), None
    if k:
        given = teacher_top(*teacher, k, divergence=divergence)
        top = given.ids_TK  # rounding decides between tokens that are nearly as likely
    expected, expected_gradients = formula(student, teacher, upstream.double(), beta, top)
    leaves = [tensor.clone().requires_grad_() for tensor in student]
    found = chunked_divergence(*leaves, targets, given, divergence=divergence)
    gradients = torch.autograd.grad((upstream * found.divergence).sum(), leaves)
    pairs = zip((found.divergence, *gradients), (expected, *expected_gradients), strict=True)
    return [
        ((ours.double() - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs
    ]


@pytest.mark.parametrize("k", [0, 16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_divergence_and_gradients_are_those_of_the_formula(lab, gpu_models, dtype, beta, k):
    policy = lab.policy(gpu_config(gpu_models["qwen3-tied", 0]))
    found = policy.call("run", errors, dtype, beta, k)[0]
    assert max(found) < TOLERANCE[dtype], found
