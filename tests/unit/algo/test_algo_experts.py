"""Losses of routers: an independent formula, and the same however tokens are split."""

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlsys.algo.experts import Groups, load_balancing_loss, load_metrics, z_loss

E, K = 6, 2


def random_router(num_tokens, seed=0):
    """Logits, scores and choices of unevenly used experts."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, E, generator=rng, dtype=torch.float64) + torch.arange(E) / 3
    logits.requires_grad_()
    chosen = torch.zeros(num_tokens, E, dtype=torch.bool)
    chosen[torch.arange(num_tokens)[:, None], logits.topk(K).indices] = True
    return logits, logits.softmax(-1), chosen


def loss_of(scores, chosen, groups):
    return load_balancing_loss(scores, groups.counts(chosen), groups, top_k=K)


def groups_of(sequences, is_token, level, **step):
    num_sequences = int(sequences.max()) + 1
    return Groups.of_micro_batch(sequences, is_token, num_sequences, level, **step)


def test_one_micro_batch_is_the_loss_of_transformers():
    logits, scores, chosen = random_router(50)
    everything = torch.ones(50, dtype=torch.bool)
    groups = groups_of(
        torch.zeros(50, dtype=torch.int64), everything, "aux_loss", step_tokens=50, step_rows=1
    )
    # transformers does not divide by the number of experts that a token goes to.
    expected = load_balancing_loss_func((logits,), E, K) / K
    loss = loss_of(scores, chosen, groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
    assert theirs.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_balanced_experts_cost_1_and_one_expert_for_all_costs_the_most():
    everything, sequences = torch.ones(E, dtype=torch.bool), torch.zeros(E, dtype=torch.int64)
    groups = groups_of(sequences, everything, "aux_loss", step_tokens=E, step_rows=1)
    uniform, each = torch.full((E, E), 1 / E), torch.eye(E, dtype=torch.bool)
    balanced = load_balancing_loss(uniform, groups.counts(each), groups, top_k=1)
    assert balanced.item() == pytest.approx(1)
    first = torch.zeros(E, E, dtype=torch.bool)
    first[:, 0] = True
    collapsed = load_balancing_loss(first.float(), groups.counts(first), groups, top_k=1)
    assert collapsed.item() == pytest.approx(E)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_rows_are_balanced_each_by_itself_however_they_are_packed(num_parts):
    lengths = torch.tensor([7, 20, 3, 11, 9])
    _, scores, chosen = random_router(int(lengths.sum()))
    sequences = torch.repeat_interleave(torch.arange(5), lengths)
    expected = torch.stack(
        [
            E * (chosen[own].double().mean(0) / K * scores[own].mean(0)).sum()
            for own in (sequences == row for row in range(5))
        ]
    ).mean()
    total = torch.zeros(())
    for part in range(num_parts):
        own = sequences % num_parts == part
        rows = sequences[own].unique(return_inverse=True)[1]
        everything = torch.ones(len(rows), dtype=torch.bool)
        groups = groups_of(rows, everything, "seq_aux_loss", step_tokens=50, step_rows=5)
        total = total + loss_of(scores[own], chosen[own], groups)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("level", ["aux_loss", "seq_aux_loss"])
def test_filling_and_repeated_rows_do_not_count(level):
    sequences = torch.tensor([0] * 8 + [1] * 12 + [2] * 5)
    is_token = sequences < 2
    _, scores, chosen = random_router(25)
    step = {"step_tokens": 40, "step_rows": 3}
    loss = loss_of(scores, chosen, groups_of(sequences, is_token, level, **step))
    without = groups_of(sequences[is_token], is_token[is_token], level, **step)
    expected = loss_of(scores[is_token], chosen[is_token], without)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected > 0
    nothing = torch.zeros_like(is_token)  # a row that is repeated for its experts' sake
    assert loss_of(scores, chosen, groups_of(sequences, nothing, level, **step)).item() == 0


@pytest.mark.parametrize("level", ["aux_loss", "seq_aux_loss"])
def test_ranks_that_share_a_micro_batch_add_up(level):
    sequences, everything = torch.tensor([0] * 9 + [1] * 15), torch.ones(24, dtype=torch.bool)
    _, scores, chosen = random_router(24)
    groups = groups_of(sequences, everything, level, step_tokens=24, step_rows=2)
    whole = loss_of(scores, chosen, groups)
    counts, parts = groups.counts(chosen), []
    for rank in range(2):
        own = slice(rank * 12, rank * 12 + 12)
        parts.append(load_balancing_loss(scores[own], counts, groups.at(own), top_k=K))
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_z_loss_is_the_mean_squared_normaliser():
    logits, _, _ = random_router(30)
    is_token = torch.arange(30) % 5 > 0
    expected = logits[is_token].exp().sum(-1).log().square().mean()
    parts = [
        z_loss(logits[own], is_token[own], step_tokens=24) for own in (slice(0, 7), slice(7, 30))
    ]
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-6)


def test_load_metrics_worked():
    counts = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])
    assert load_metrics(counts) == {
        "moe/expert_share/min": 0.0,
        "moe/expert_share/max": 0.75,
        "moe/unused_experts": 1.0,
    }
