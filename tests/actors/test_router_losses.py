"""Losses, types and counts of the router, wherever tokens and experts are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from policy_cases import padded_logprobs, policy_config, random_batch
from routing_oracle import NUM_EXPERTS, TOP_K, random_routing, replay
from test_policy_experts import FOUR_RANKS, LAYOUTS, ONE_AND_TWO_MICRO_BATCHES, by_expert, norm
from test_router_replay import replaying_config
from tiny_models import save_tiny_qwen3_moe
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlsys.algo.batching import micro_batches, shard_rows

pytestmark = pytest.mark.system

AUX, Z = 0.5, 0.01
"""So large that their gradients are as large as the policy's."""
LOSSES = {"moe_aux_loss_coeff": AUX, "moe_z_loss_coeff": Z}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("router") / "model"
    save_tiny_qwen3_moe(folder, seed=5)
    return folder


def of_transformers(folder, batch):
    """The policy's loss, and [N * S, E] logits and [N * S, K] choices of each layer."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )
    records = replay(model, batch)
    logprobs = padded_logprobs(model, batch)
    means = ((logprobs - logprobs.detach()).exp() * batch.advantages).sum(1)
    loss = -(means / batch.completion_mask.sum(1)).mean()
    return model, loss, [record[0] for record in records]


def tokens_of_rows(batch, rows):
    """[N * S] bool."""
    tokens = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for row in rows:
        tokens[row, : batch.lengths[row]] = True
    return tokens.flatten()


def balancing_losses(router, batch, shares):
    """[layers], by transformers' function; `shares` are (rows, their share of the loss)."""
    layers = []
    for logits, _ in router:
        losses = []
        for rows, share in shares:
            own = logits[tokens_of_rows(batch, rows)]
            # transformers does not divide by the number of experts that a token goes to.
            losses.append(share * load_balancing_loss_func((own,), NUM_EXPERTS, TOP_K) / TOP_K)
        layers.append(sum(losses))
    return torch.stack(layers)


def z_losses(router, batch):
    tokens = tokens_of_rows(batch, range(len(batch.lengths)))
    return torch.stack([logits[tokens].logsumexp(-1).square().mean() for logits, _ in router])


def micro_batches_of(batch, num_ranks, *, micro_batch_size=3, max_tokens_per_micro_batch=None):
    lengths = batch.lengths
    return [
        rows
        for shard in shard_rows(range(len(lengths)), lengths, num_shards=num_ranks)
        for rows in micro_batches(
            shard,
            lengths,
            micro_batch_size=micro_batch_size,
            max_tokens=max_tokens_per_micro_batch,
        )
    ]


def check(lab, folder, batch, options, shares):
    """Gradient and metrics with both losses are those of transformers."""
    options = options | LOSSES | {"use_distributed_optimizer": False}
    policy = lab.policy(policy_config(folder, **options))
    gradient = policy.call("gradient", batch)[0]
    model, loss, router = of_transformers(folder, batch)
    balancing, z = balancing_losses(router, batch, shares), z_losses(router, batch)
    alone = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    (loss + AUX * balancing.sum() + Z * z.sum()).backward()
    expected = dict(by_expert((n, p.grad) for n, p in model.named_parameters()))
    without = dict(by_expert(zip(dict(model.named_parameters()), alone, strict=True)))
    assert norm({name: expected[name] - without[name] for name in expected}) > 0.1 * norm(without)
    differences = {name: gradient[name] - expected[name] for name in expected}
    assert norm(differences) <= 1e-5 * norm(expected)
    metrics = policy.update(batch).metrics
    assert metrics["moe/aux_loss"] == pytest.approx(balancing.mean().item(), rel=1e-5)
    assert metrics["moe/z_loss"] == pytest.approx(z.mean().item(), rel=1e-5)
    tokens = tokens_of_rows(batch, range(len(batch.lengths)))
    counts = torch.stack(
        [torch.bincount(chosen[tokens].flatten(), minlength=NUM_EXPERTS) for _, chosen in router]
    )
    shares_LE = counts / counts.sum(1, keepdim=True)
    assert metrics["moe/expert_share/max"] == pytest.approx(shares_LE.max().item())
    assert metrics["moe/expert_share/min"] == pytest.approx(shares_LE.min().item())
    assert metrics["moe/unused_experts"] == (counts == 0).sum(1).double().mean().item()


@pytest.mark.parametrize(
    ("layout", "splitting"),
    [
        ("one rank", {}),
        ("EP 2", ONE_AND_TWO_MICRO_BATCHES),  # a rank repeats a row that must not count
        FOUR_RANKS("TP 2 x DP 2 x EP 4", {"recompute": "selective"}),
    ],
)
def test_micro_batches_are_balanced_and_count_by_their_tokens(lab, folder, layout, splitting):
    batch, options = random_batch(), LAYOUTS[layout] | splitting
    num_ranks = options.get("world_size", 1) // options.get("tensor_parallel_size", 1)
    cut = {key: value for key, value in splitting.items() if key != "recompute"}
    total = batch.lengths.sum().item()
    shares = [
        (rows, batch.lengths[rows].sum().item() / total)
        for rows in micro_batches_of(batch, num_ranks, **cut)
    ]
    assert len(shares) > 1
    check(lab, folder, batch, options, shares)


@pytest.mark.parametrize(
    ("layout", "splitting"),
    [
        ("EP 2", ONE_AND_TWO_MICRO_BATCHES),
        ("TP 2 x EP 2", {"recompute": "full", "micro_batch_size": 5}),
        FOUR_RANKS("PP 2 x EP 2", {"micro_batch_size": 1}),
        FOUR_RANKS("CP 2 x DP 2 x EP 4", {}),
    ],
)
def test_rows_are_balanced_wherever_they_are(lab, folder, layout, splitting):
    batch = random_batch()
    shares = [([row], 1 / 8) for row in range(8)]
    options = LAYOUTS[layout] | splitting | {"moe_router_load_balancing_type": "seq_aux_loss"}
    check(lab, folder, batch, options, shares)


def own_choices(folder, batch):
    """[len - 1, layers, K] of each row: what routers would choose where `batch` is replayed."""
    _, _, router = of_transformers(folder, batch)
    own = torch.stack([logits.topk(TOP_K).indices for logits, _ in router], 1)
    own = own.unflatten(0, batch.input_ids.shape).byte().numpy()
    return [own[row, : length - 1] for row, length in enumerate(batch.lengths.tolist())]


@pytest.mark.parametrize("layout", ["one rank", FOUR_RANKS("PP 2 x EP 2")])
def test_changed_choices_are_counted(lab, folder, layout):
    batch = random_batch()
    own, other = own_choices(folder, batch), random_routing(batch.lengths)
    unchanged = replace(batch, routed_experts=[row[..., ::-1].copy() for row in own])
    replayed = [other[row] if row in (1, 4) else own[row] for row in range(8)]
    changed = replace(batch, routed_experts=replayed)
    pairs = zip(replayed, own_choices(folder, changed), strict=True)
    missing = [~(there[..., None] == here[..., None, :]).any(-1) for there, here in pairs]
    experts = np.concatenate([rows.ravel() for rows in missing]).mean()
    tokens = np.concatenate([rows.any(-1).ravel() for rows in missing]).mean()
    assert 0.1 < experts < tokens < 0.5
    policy = lab.policy(replaying_config(folder, lr=0.0, **LAYOUTS[layout]))
    metrics = policy.update(changed).metrics
    assert metrics["router_replay/changed_experts"] == pytest.approx(experts)
    assert metrics["router_replay/changed_tokens"] == pytest.approx(tokens)
    assert policy.update(unchanged).metrics["router_replay/changed_tokens"] == 0


def test_routers_compute_in_their_own_type(lab, folder):
    """In a bfloat16 model, logits of the router in fp32 are those of transformers in fp32."""
    batch = random_batch()
    choices = {}
    for dtype in (None, "fp32", "fp64"):
        policy = lab.policy(policy_config(folder, dtype="bfloat16", moe_router_dtype=dtype))
        choices[dtype] = policy.call("router_logits", batch)[0]
    hidden, weight, logits = choices["fp32"]
    assert logits.dtype == torch.float32
    expected = torch.nn.functional.linear(hidden.float(), weight.float())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert choices[None][2].dtype == torch.bfloat16
    assert choices["fp64"][2].dtype == torch.float64
