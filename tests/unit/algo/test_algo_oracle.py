"""One GRPO update equals a plain Hugging Face implementation of the same equation.

The oracle pads, attends with a mask and loops over completions. The pipeline under test cuts into
optimizer steps, shards and micro-batches, packs, and adds up gradients.
"""

from itertools import pairwise

import pytest
import torch
from algo_cases import PAD, VOCAB, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlsys.algo.batching import (
    micro_batches,
    optimizer_step_rows,
    pack,
    shard_rows,
    unpack_logprobs,
)
from rlsys.algo.logprobs import chunked_logprobs
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.sampling import Sampling
from rlsys.algo.update_metrics import MetricSums
from rlsys.algo.weighting import loss_weights
from rlsys.config import GrpoConfig

LENGTHS_PG = [[5, 2, 1, 7], [3, 8, 4, 0]]  # the last completion is empty: it counts, it adds 0
MAX_COMPLETION_LENGTH = 8
TEMPERATURE = 0.8
CONFIG = GrpoConfig(beta=0.04, epsilon=0.1, epsilon_high=0.15)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).float()


@pytest.fixture(scope="module")
def batch(model):
    """Old and reference log-probs around the policy's own, so that some ratios are clipped."""
    batch = make_batch(LENGTHS_PG)
    with torch.no_grad():
        logprobs = padded_logprobs(model, batch)
    rng = torch.Generator().manual_seed(1)
    for name, spread in (("old_logprobs", 0.2), ("ref_logprobs", 0.4), ("rollout_logprobs", 0.2)):
        noise = spread * torch.randn(logprobs.shape, generator=rng)
        setattr(batch, name, (logprobs + noise) * batch.completion_mask)
    return batch


def padded_logprobs(model, batch):
    """[N, S], 0 at the first position, from one padded forward pass."""
    attention_mask = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    logits = model(input_ids=batch.input_ids, attention_mask=attention_mask.long()).logits
    log_softmax = torch.log_softmax(logits[:, :-1] / TEMPERATURE, dim=-1)
    logprobs = log_softmax.gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(logprobs, (1, 0))


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def oracle(model, batch, rows, loss_type):
    """The equation as it stands in the papers, completion by completion."""
    logprobs = padded_logprobs(model, batch)
    sums, lengths, kls, clipped = [], [], [], []
    for n in rows:
        mask = batch.completion_mask[n]
        log_pi, old = logprobs[n][mask], batch.old_logprobs[n][mask]
        advantage = batch.advantages[n][mask]
        log_ratio = log_pi - old
        if loss_type == "gspo" and len(log_ratio):
            log_ratio = log_ratio.mean().expand(log_ratio.shape)
        ratio = log_ratio.exp()
        unclipped, bounded = ratio * advantage, ratio.clamp(0.9, 1.15) * advantage
        surrogate = torch.minimum(unclipped, bounded)
        if loss_type == "cispo":
            surrogate = ratio.clamp(max=1.15).detach() * advantage * log_pi
        log_ratio_to_ref = batch.ref_logprobs[n][mask] - log_pi
        kl = log_ratio_to_ref.exp() - log_ratio_to_ref - 1
        sums.append((-surrogate + CONFIG.beta * kl).sum())
        lengths.append(len(ratio))
        kls.append(kl)
        clipped.append(bounded < unclipped)
    if loss_type in ("grpo", "gspo"):
        loss = sum(s / max(n, 1) for s, n in zip(sums, lengths, strict=True)) / len(rows)
    elif loss_type in ("dapo", "cispo"):
        loss = sum(sums) / sum(lengths)
    else:
        loss = sum(sums) / (len(rows) * MAX_COMPLETION_LENGTH)
    model.zero_grad()
    loss.backward()
    statistics = {
        "kl": torch.cat(kls).mean().item(),
        "clip_ratio/region_mean": torch.cat(clipped).float().mean().item(),
        "num_loss_tokens": sum(lengths),
    }
    if loss_type == "cispo":
        del statistics["clip_ratio/region_mean"]
    return loss.item(), gradient(model), statistics


def packed_logprobs(model, packed, *, chunk_size=None):
    """Log-probs and entropy of a packed micro-batch, one forward pass per sequence."""
    hidden = torch.cat(
        [
            model.model(input_ids=packed.input_ids[None, start:end]).last_hidden_state[0]
            for start, end in pairwise(packed.cu_seqlens.tolist())
        ]
    )
    return chunked_logprobs(
        hidden,
        model.lm_head.weight,
        packed.targets,
        sampling=Sampling(TEMPERATURE),
        chunk_size=chunk_size or len(hidden),
    )


def pipeline(model, batch, rows, loss_type, *, num_shards=1, chunk_size=None, **micro_batching):
    """What the policy's ranks do, one after the other, gradients added up."""
    config = CONFIG.model_copy(update={"loss_type": loss_type})
    weights = loss_weights(
        batch.completion_mask,
        aggregation=config.loss_settings.loss_aggregation,
        max_completion_length=MAX_COMPLETION_LENGTH,
        rows=rows,
    )
    model.zero_grad()
    sums, total = MetricSums(), 0.0
    for shard in shard_rows(rows, batch.lengths, num_shards=num_shards):
        for piece in micro_batches(shard, batch.lengths, **micro_batching):
            packed = pack(batch, piece, weights, multiple_of=4)
            logprobs, entropy = packed_logprobs(model, packed, chunk_size=chunk_size)
            inputs = LossInput.from_packed(packed, logprobs, entropy)
            loss, statistics = losses[loss_type](inputs, config)
            loss.backward()
            sums.add(statistics)
            total += loss.item()
    return total, gradient(model), sums.means()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@settings(max_examples=8)
@given(
    per_step=st.sampled_from([2, 4, 8]),
    num_shards=st.integers(1, 3),
    micro_batch_size=st.integers(1, 8),
    max_tokens=st.none() | st.integers(12, 40),
    chunk_size=st.none() | st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_gradient_equals_plain_transformers_however_it_is_split(
    model, batch, loss_type, per_step, num_shards, micro_batch_size, max_tokens, chunk_size, seed
):
    rows = optimizer_step_rows(8, global_batch_size=per_step, num_iterations=1, seed=seed)[0]
    expected_loss, expected_grad, expected_metrics = oracle(model, batch, rows, loss_type)
    loss, grad, metrics = pipeline(
        model,
        batch,
        rows,
        loss_type,
        num_shards=num_shards,
        micro_batch_size=micro_batch_size,
        max_tokens=max_tokens,
        chunk_size=chunk_size,
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_the_case_above_has_everything_that_could_go_wrong(model, batch):
    _, grad, metrics = pipeline(model, batch, range(8), "grpo", micro_batch_size=8, max_tokens=None)
    assert grad.norm() > 1e-2
    assert metrics["clip_ratio/low_mean"] > 0
    assert metrics["clip_ratio/high_mean"] > 0
    assert metrics["clip_ratio/region_mean"] < 1
    assert metrics["kl"] > 0.01
    assert metrics["num_loss_tokens"] == sum(map(sum, LENGTHS_PG))


def test_unpacked_logprobs_equal_those_of_a_padded_forward_pass(model, batch):
    out = torch.full(batch.input_ids.shape, torch.nan)
    weights = torch.zeros(batch.input_ids.shape)
    with torch.no_grad():
        expected = padded_logprobs(model, batch) * batch.completion_mask
        for piece in micro_batches(range(8), batch.lengths, micro_batch_size=8, max_tokens=15):
            packed = pack(batch, piece, weights, multiple_of=8)
            logprobs, _ = packed_logprobs(model, packed)
            unpack_logprobs(logprobs, packed, out, piece)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_recomputed_old_logprobs_change_nothing_in_the_first_step(model, batch):
    """Leaving out old log-probs when one step takes the whole rollout is exact."""
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    kwargs = {"micro_batch_size": 3, "max_tokens": None}
    with torch.no_grad():
        own = padded_logprobs(model, batch) * batch.completion_mask
    recomputed = type(batch)(**fields | {"old_logprobs": own})
    left_out = type(batch)(**fields | {"old_logprobs": None})
    _, grad, metrics = pipeline(model, left_out, range(8), "grpo", **kwargs)
    _, expected_grad, _ = pipeline(model, recomputed, range(8), "grpo", **kwargs)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    assert metrics["ratio/min"] == metrics["ratio/max"] == 1
    assert metrics["clip_ratio/region_mean"] == 0


def test_pad_tokens_do_not_leak_into_the_gradient(model, batch):
    assert (batch.input_ids == PAD).any()
    kwargs = {"micro_batch_size": 2, "max_tokens": None}
    _, expected, _ = pipeline(model, batch, range(8), "dapo", **kwargs)
    other = batch.input_ids.clone()
    other[torch.arange(other.shape[1]) >= batch.lengths[:, None]] = 5
    fields = {name: getattr(batch, name) for name in batch.__slots__}
    _, grad, _ = pipeline(
        model, type(batch)(**fields | {"input_ids": other}), range(8), "dapo", **kwargs
    )
    assert torch.equal(grad, expected)
