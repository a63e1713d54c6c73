"""rlsys.algo over a real process group: two processes, gloo."""

import algo_ranks
import pytest
import torch
import torch.multiprocessing as mp

from rlsys.algo.context_parallel import chunk_positions
from rlsys.algo.logprobs import chunked_logprobs
from rlsys.algo.update_metrics import MetricSums

pytestmark = pytest.mark.processes

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(algo_ranks.run_rank, args=(WORLD_SIZE, folder), nprocs=WORLD_SIZE)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def whole():
    """The same numbers from torch.log_softmax over the whole vocabulary."""
    case = algo_ranks.problem()
    hidden = case["hidden"].requires_grad_()
    weight = case["weight"].requires_grad_()
    logits = hidden @ weight.T
    logits.retain_grad()
    log_softmax = torch.log_softmax(logits / algo_ranks.TEMPERATURE, dim=-1)
    logprobs = log_softmax.gather(-1, case["targets"][:, None]).squeeze(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    (logprobs * case["grad"] + entropy).sum().backward()
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "logits_grad": logits.grad,
        "hidden_grad": hidden.grad,
        "weight_grad": weight.grad,
    }


@pytest.mark.parametrize("name", ["logprobs", "entropy"])
@pytest.mark.parametrize("prefix", ["", "chunked_"])
def test_every_rank_returns_the_whole_vocabularys_numbers(ranks, whole, prefix, name):
    for rank in ranks:
        torch.testing.assert_close(rank[prefix + name], whole[name], rtol=1e-6, atol=1e-6)


def test_gradients_of_slices_make_up_the_whole(ranks, whole):
    logits_grad = torch.cat([rank["logits_grad"] for rank in ranks], dim=1)
    torch.testing.assert_close(logits_grad, whole["logits_grad"], rtol=1e-5, atol=1e-5)
    weight_grad = torch.cat([rank["weight_grad"] for rank in ranks])
    torch.testing.assert_close(weight_grad, whole["weight_grad"], rtol=1e-5, atol=1e-5)
    # Each rank has its share; megatron-core sums them where the hidden states came from.
    hidden_grad = sum(rank["hidden_grad"] for rank in ranks)
    torch.testing.assert_close(hidden_grad, whole["hidden_grad"], rtol=1e-5, atol=1e-5)


def test_context_parallel_ranks_gather_all_tokens_and_their_gradients(ranks):
    tokens = algo_ranks.shared_tokens()
    positions = chunk_positions(torch.tensor([0, 4, 12]), WORLD_SIZE)
    for number, rank in enumerate(ranks):
        own = tokens[positions[number]]
        assert torch.equal(rank["gathered_False"], tokens)
        assert torch.equal(rank["gathered_True"], tokens)
        assert torch.equal(rank["False"], 2 * own)
        assert torch.equal(rank["True"], (1 + 2) * 2 * own)  # the parts of both ranks


def test_reduced_metrics_are_those_of_one_rank_with_all_micro_batches(ranks):
    sums = MetricSums()
    for rank in range(WORLD_SIZE):
        sums.add(algo_ranks.statistics(rank))
    # loss 0.5 + 1.5, kl (1 + 3) / (2 + 3) tokens, extremes over both.
    expected = {"loss": 2.0, "num_loss_tokens": 5.0, "kl": 0.8, "ratio/min": -0.1, "ratio/max": 1.1}
    assert sums.means() == pytest.approx(expected)
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(expected)


def test_ranks_find_the_likeliest_tokens_of_all_slices(ranks):
    for rank in ranks:
        assert rank["is_likeliest"].tolist() == [1 - n % 2 for n in range(algo_ranks.TOKENS)]


@pytest.mark.parametrize("name", [*algo_ranks.SAMPLINGS, "penalties"])
def test_ranks_leave_out_and_penalize_the_same_tokens_as_one(ranks, name):
    case = algo_ranks.problem()
    sampling = (algo_ranks.SAMPLINGS | {"penalties": algo_ranks.PENALIZED})[name]
    hidden = case["hidden"].requires_grad_()
    logprobs, entropy = chunked_logprobs(
        hidden,
        case["weight"],
        case["targets"],
        sampling=sampling,
        chunk_size=1024,
        history=algo_ranks.history() if sampling.penalizes else None,
    )
    (logprobs * case["grad"] + entropy).sum().backward()
    for rank in ranks:
        torch.testing.assert_close(rank[name]["logprobs"], logprobs.detach())
        torch.testing.assert_close(rank[name]["entropy"], entropy.detach())
    shares = sum(rank[name]["hidden_grad"] for rank in ranks)
    torch.testing.assert_close(shares, hidden.grad)
