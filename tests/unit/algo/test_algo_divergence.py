"""The divergence from a teacher: TRL's on the same tensors, however it is cut."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from divergence_ranks import CASES, SIZES, loss_of_ours, run_rank, tensors
from torch.nn.functional import linear

from rlsys.algo.distributions import Divergence, teacher_top
from rlsys.algo.divergence import TeacherHidden

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.fixture(scope="module")
def trl():
    """TRL's modules of GKD, and of distillation from the likeliest tokens of a server."""
    with pytest.MonkeyPatch.context() as patch:
        # TRL imports vLLM when it can: 5 seconds, and nothing here needs it.
        patch.setitem(sys.modules, "vllm", None)
        with warnings.catch_warnings(action="ignore"):  # that it is experimental
            gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
            server = pytest.importorskip(
                "trl.experimental.server_distillation.server_distillation_trainer"
            )
        yield SimpleNamespace(gkd=gkd, server=server)


@pytest.fixture(scope="module")
def trl_loss(trl):
    return trl.gkd.GKDTrainer.generalized_jsd_loss


def loss_of_trl(trl_loss, own, teachers, weights, beta, temperature):
    """Sum of weights x divergences, and the gradients of the student's tensors."""
    own = [tensor.clone().requires_grad_() for tensor in own]
    logits = linear(*own)[None]
    per_entry = trl_loss(
        logits, linear(*teachers)[None], beta=beta, temperature=temperature, reduction="none"
    )
    loss = (per_entry[0].sum(-1) * weights).sum()
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in own]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradient_are_those_of_trl(trl_loss, beta, temperature, dtype):
    own, teachers, targets, weights = tensors(dtype)
    expected, expected_grads = loss_of_trl(trl_loss, own, teachers, weights, beta, temperature)
    divergence = Divergence(beta, temperature)
    for chunk_size in (4, 256):
        loss, grads, _ = loss_of_ours(
            own, TeacherHidden(*teachers), targets, weights, divergence, chunk_size=chunk_size
        )
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        for grad, of_trl in zip(grads, expected_grads, strict=True):
            # In float32 the reverse KL's gradient is a small difference of large logs.
            tolerance = 1e-9 if dtype == torch.float64 else 1e-4
            torch.testing.assert_close(grad, of_trl, atol=tolerance, rtol=tolerance)


def test_a_mean_over_tokens_is_trls_batch_mean(trl_loss):
    own, teachers, targets, _ = tensors()
    labels = torch.where(torch.arange(SIZES["tokens"]) % 3 == 0, -100, targets)
    mask = labels != -100
    expected = trl_loss(linear(*own)[None], linear(*teachers)[None], labels[None], beta=0.5)
    loss, _, _ = loss_of_ours(
        own, TeacherHidden(*teachers), targets, mask / mask.sum(), Divergence()
    )
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    own, _, targets, weights = tensors()
    for beta in BETAS:
        loss, grads, _ = loss_of_ours(own, TeacherHidden(*own), targets, weights, Divergence(beta))
        assert loss == pytest.approx(0.0, abs=1e-6)
        assert max(grad.abs().max() for grad in grads) < 1e-6


def test_what_is_reported_beside_the_divergence():
    own, teachers, targets, weights = tensors(torch.float64)
    divergence = Divergence(0.5, temperature=0.7)
    *_, found = loss_of_ours(own, TeacherHidden(*teachers), targets, weights, divergence)
    log_p, log_q = ((linear(*both) / 0.7).log_softmax(-1) for both in (own, teachers))
    torch.testing.assert_close(found.logprobs, log_p.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(found.teacher_entropy, -(log_q.exp() * log_q).sum(-1))
    assert torch.equal(found.is_likeliest.bool(), log_p.argmax(-1) == targets)
    assert not found.logprobs.requires_grad
    assert found.divergence.requires_grad


@pytest.mark.parametrize("beta", BETAS)
def test_ids_that_fill_up_a_vocabulary_are_in_no_distribution(trl_loss, beta):
    own, teachers, targets, weights = tensors(torch.float64)
    size = 29
    kept = [(both[0], both[1][:size]) for both in (own, teachers)]
    expected, (of_hidden, of_weight) = loss_of_trl(trl_loss, *kept, weights, beta, 1.0)
    divergence = Divergence(beta, num_token_ids=size)
    loss, grads, _ = loss_of_ours(
        own, TeacherHidden(*teachers), targets.clamp(max=size - 1), weights, divergence
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads[0], of_hidden)
    torch.testing.assert_close(grads[1][:size], of_weight)
    assert not grads[1][size:].any()


def test_no_tokens_have_no_divergence_and_a_gradient_of_zero():
    (hidden, weight), teachers, targets, _ = tensors()
    teacher = TeacherHidden(teachers[0][:0], teachers[1])
    _, grads, found = loss_of_ours(
        (hidden[:0], weight), teacher, targets[:0], torch.zeros(0), Divergence()
    )
    assert found.divergence.shape == (0,)
    assert not grads[1].any()


# --- the likeliest tokens ------------------------------------------------------------------------


def trl_top(trl, own, teachers, weights, beta, temperature, k):
    """The sparse divergence of TRL's distillation from a server, with its tail."""
    own = [tensor.clone().requires_grad_() for tensor in own]
    log_p, log_q = ((linear(*both) / temperature).log_softmax(-1) for both in (own, teachers))
    top, ids = log_q.topk(k)
    valid = torch.ones_like(ids, dtype=torch.bool)
    log_p, mask = trl._add_tail_bucket(log_p.gather(-1, ids), valid)
    log_q, _ = trl._add_tail_bucket(top, valid)
    loss = (trl._jsd_divergence(log_p, log_q, beta, mask).sum(-1) * weights).sum()
    loss.backward()
    return loss.detach(), [tensor.grad for tensor in own]


@pytest.mark.parametrize("k", [1, 5, 36])
@pytest.mark.parametrize("beta", BETAS)
def test_top_k_with_the_rest_is_trls(trl, beta, k):
    own, teachers, targets, weights = tensors(torch.float64)
    divergence = Divergence(beta, temperature=0.8)
    expected, expected_grads = trl_top(trl.server, own, teachers, weights, beta, 0.8, k)
    teacher = teacher_top(*teachers, k, divergence=divergence, chunk_size=5)
    loss, grads, _ = loss_of_ours(own, teacher, targets, weights, divergence, chunk_size=4)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for grad, of_trl in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, of_trl, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_nearly_all_tokens_are_nearly_the_whole_divergence(beta):
    own, teachers, targets, weights = tensors(torch.float64)
    whole, *_ = loss_of_ours(own, TeacherHidden(*teachers), targets, weights, Divergence(beta))
    found = []
    for k in (2, 10, 36):
        teacher = teacher_top(*teachers, k, divergence=Divergence(beta))
        loss, *_ = loss_of_ours(own, teacher, targets, weights, Divergence(beta))
        found.append(loss.item())
    assert found[0] <= found[1] <= found[2] <= whole + 1e-9  # merging outcomes loses information
    assert found[2] == pytest.approx(whole.item(), rel=1e-3)


# --- a vocabulary in slices ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_that_share_the_vocabulary_find_the_same(on_two_ranks, case):
    k, beta = case
    own, teachers, targets, weights = tensors(torch.float64)
    divergence = Divergence(beta, 0.8)
    teacher = TeacherHidden(*teachers)
    if k:
        teacher = teacher_top(*teachers, k, divergence=divergence)
    loss, (of_hidden, of_weight), found = loss_of_ours(own, teacher, targets, weights, divergence)
    parts = [results[case] for results in on_two_ranks]
    for part in parts:
        torch.testing.assert_close(part["loss"], loss)
        for value, expected in zip(part["values"], found, strict=True):
            torch.testing.assert_close(value, expected.detach())
        assert not k or torch.equal(part["ids"], teacher.ids_TK)
    torch.testing.assert_close(sum(part["of_hidden"] for part in parts), of_hidden)
    halves = torch.cat([part["of_weight"] for part in parts])
    torch.testing.assert_close(halves[: SIZES["vocab"]], of_weight)
    assert not halves[SIZES["vocab"] :].any()
