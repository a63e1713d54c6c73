"""The divergence from a teacher on a GPU, against the formula in float64; gradients too."""

import pytest
import torch
from distill_cases import divergence_of
from gpu_cases import gpu_config
from torch.nn.functional import linear, pad

from rlsys.algo.distributions import CHUNK_TOKENS, Divergence, teacher_top
from rlsys.algo.divergence import TeacherHidden, chunked_divergence

pytestmark = pytest.mark.gpu(1)

TOKENS, VOCAB, HIDDEN, TEACHER_HIDDEN = 300, 4_160, 64, 96
PADDING = 6
"""Ids at the end that only one of the models has."""
TEMPERATURE = 0.8
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-7}
"""Error of a value or gradient, relative to the largest."""


def formula(student, teacher, upstream, beta, top):
    """Divergences, over tokens `top` and the rest or over all, and gradients, in float64.

    Logits are rounded to the tensors' type, as a model's are.
    """
    of_student, of_teacher = (linear(*both)[:, :-PADDING].double() for both in (student, teacher))
    of_student.requires_grad_()
    log_p, log_q = ((logits / TEMPERATURE).log_softmax(-1) for logits in (of_student, of_teacher))
    if top is not None:
        log_p, log_q = (
            torch.cat([known, (-known.exp().sum(-1, keepdim=True)).log1p()], dim=-1)
            for known in (log_p.gather(-1, top), log_q.gather(-1, top))
        )
    values = divergence_of(log_p, log_q, beta)
    (of_logits,) = torch.autograd.grad((upstream * values).sum(), of_student)
    hidden, weight = (tensor.double() for tensor in student)
    of_weight = pad(of_logits.t() @ hidden, (0, 0, 0, PADDING))
    return values.detach(), (of_logits @ weight[:-PADDING], of_weight)


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
        given = teacher_top(*teacher, k, divergence=divergence, chunk_size=TOKENS)
        top = given.ids_TK  # rounding decides between tokens that are nearly as likely
    expected, expected_gradients = formula(student, teacher, upstream.double(), beta, top)
    leaves = [tensor.clone().requires_grad_() for tensor in student]
    # In one chunk, where rounding to bfloat16 may differ with the shape of a product.
    size = {"float32": CHUNK_TOKENS, "bfloat16": TOKENS}[dtype]
    found = chunked_divergence(*leaves, targets, given, divergence=divergence, chunk_size=size)
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
