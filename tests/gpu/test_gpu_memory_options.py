"""Options that save memory: each trains as bfloat16 does, needs what is estimated, and resumes."""

import pytest
import ray
import torch
from gpu_cases import DEVICE, gpu_config, long_batch, save_gpu_model
from gpu_lab import GpuRank
from policy_cases import exported

from rlsys.actors.policy import PolicyActors
from rlsys.model.memory import GIB, estimate_memory
from rlsys.model.shape import read_model_shape

pytestmark = pytest.mark.gpu(1)

ROWS, LONGEST = (32, 800) if DEVICE == "cuda" else (8, 100)
BATCH = long_batch(ROWS, LONGEST)
WIDTH = 1024 if DEVICE == "cuda" else 128


def sizes(width):
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 8,
        "num_attention_heads": max(2, width // 128),
        "num_key_value_heads": max(1, width // 256),
        "head_dim": min(128, width // 2),
    }


PRECISION_AWARE = {"use_precision_aware_optimizer": True}
OFFLOAD = PRECISION_AWARE | {"optimizer_cpu_offload": True}
OPTIONS = {
    "precision aware": PRECISION_AWARE,
    "moments in bf16": PRECISION_AWARE | {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"},
    "moments in fp8": PRECISION_AWARE | {"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp8"},
    "weights in fp16": PRECISION_AWARE | {"main_params_dtype": "fp16"},
    "gradients in bf16": PRECISION_AWARE | {"main_grads_dtype": "bf16"},
    "offload": OFFLOAD,
    "offload half": OFFLOAD | {"optimizer_offload_fraction": 0.5},
    "offload, overlapped": OFFLOAD | {"overlap_cpu_optimizer_d2h_h2d": True},
    "full": {"recompute": "full"},
    "groups": {"recompute": "full", "recompute_num_layers": 4},
    "block": {"recompute": "full", "recompute_method": "block", "recompute_num_layers": 4},
    "mlp": {"recompute": "selective"},
    "core_attn": {"recompute": "selective", "recompute_modules": ["core_attn"]},
}
FP8 = {
    "tensorwise": {"fp8_format": "hybrid"},
    "e4m3": {"fp8_format": "e4m3"},
    "delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
    "parameters": {"fp8_format": "hybrid", "fp8_param_gather": True},
    "parameters, blockwise": {
        "fp8_format": "e4m3",
        "fp8_recipe": "blockwise",
        "fp8_param_gather": True,
    },
    "parameters, precision aware": PRECISION_AWARE
    | {"fp8_format": "hybrid", "fp8_param_gather": True, "exp_avg_dtype": "bf16"},
    "full": {"fp8_format": "hybrid", "recompute": "full"},
}
TOLERANCE = {"full": 1e-3, "groups": 1e-3, "block": 1e-3, "mlp": 1e-3, "core_attn": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "model"
    save_gpu_model(folder, "qwen3-untied", **sizes(WIDTH))
    return folder


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """So large that forgetting what an option saves would be seen."""
    folder = tmp_path_factory.mktemp("memory") / "wide"
    save_gpu_model(folder, "qwen3-untied", **sizes(2 * WIDTH))
    return folder


def config_of(model, **options):
    return gpu_config(
        model,
        num_completions=ROWS,
        longest=LONGEST,
        dtype="bfloat16",
        **{"max_tokens_per_micro_batch": 4 * LONGEST} | options,
    )


def train(policy, num_updates):
    """(loss, gradient norm) of updates of supervised training."""
    updates = [policy.update(BATCH, loss="sft").metrics for _ in range(num_updates)]
    return [(metrics["loss"], metrics["grad_norm"]) for metrics in updates]


def reset_peak(rank):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(rank):
    return torch.cuda.max_memory_allocated()


@pytest.fixture(scope="module")
def usual(lab, model):
    return train(lab.policy(config_of(model)), 4)


def check_training(updates, usual, *, tolerance):
    for (loss, norm), (expected, expected_norm) in zip(updates, usual, strict=True):
        assert loss == pytest.approx(expected, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=30 * tolerance)
    assert updates[-1][0] < updates[0][0]


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains_as_without_it(lab, model, usual, name):
    updates = train(lab.policy(config_of(model, **OPTIONS[name])), len(usual))
    check_training(updates, usual, tolerance=TOLERANCE.get(name, 5e-3))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs FP8")
@pytest.mark.parametrize("name", FP8)
def test_fp8_trains_as_bfloat16_does(lab, model, usual, name):
    policy = lab.policy(config_of(model, **FP8[name]))
    before = policy.compute_logprobs(BATCH)[0]
    plain = lab.policy(config_of(model)).compute_logprobs(BATCH)[0]
    # The first log-probs too: scales that nothing has found yet would make them wrong.
    # Rounding of a random model moves them by 0.11 nats.
    assert (before - plain).abs().sum() / BATCH.completion_mask.sum() < 0.2
    policy = lab.policy(config_of(model, **FP8[name]))
    check_training(train(policy, len(usual)), usual, tolerance=3e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="measures GPU memory")
@pytest.mark.parametrize("name", ["moments in bf16", "full", "mlp", "fp8 tensorwise"])
def test_what_an_option_needs_is_what_was_estimated(gpus, wide_model, name):
    options = FP8[name[4:]] if name.startswith("fp8 ") else OPTIONS[name]
    # Few tokens at once: what a layer works with in its backward pass is in no formula.
    config = config_of(wide_model, **options, max_tokens_per_micro_batch=2 * LONGEST)
    # Processes that had another policy before keep some of its memory.
    policy = PolicyActors(config, device="cuda", place=gpus.rank_by_rank, rank_class=GpuRank)
    policy.start()
    policy.update(BATCH, loss="sft")  # makes the optimizer's state
    policy.call("run", reset_peak)
    policy.update(BATCH, loss="sft")
    (measured,) = policy.call("run", peak)
    policy.close()
    shape = read_model_shape(wide_model)
    found = estimate_memory(config, shape, shape, device="cuda")[0].gib
    expected = sum(gib for purpose, gib in found.items() if purpose not in OUTSIDE)
    print(f"{name}: measured {measured / GIB:.2f} GiB, estimate {expected:.2f}: {found}")
    assert 0.95 * expected < measured / GIB < 1.05 * expected + WORKSPACES_GIB


OUTSIDE = ("process", "weight sync")
"""Purposes that an update alone has no memory for, or not in torch's allocator."""
WORKSPACES_GIB = 0.3
"""Part of "process" that is in torch's allocator: what libraries work in."""


@pytest.mark.skipif(DEVICE == "cpu", reason="needs Transformer Engine's optimizer")
@pytest.mark.parametrize(
    "options",
    [
        OPTIONS["precision aware"],
        OPTIONS["moments in bf16"],
        FP8["tensorwise"],
        FP8["delayed"],
        FP8["parameters"],
        FP8["parameters, blockwise"],
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_resume_is_exact(lab, model, tmp_path, options):
    config = config_of(model, **options)
    policy = lab.policy(config)
    train(policy, 2)
    (tmp_path / "step-2").mkdir()
    policy.save_checkpoint(tmp_path / "step-2")
    weights, state = exported(policy), policy.call("run", optimizer_state)[0]
    updates = train(policy, 2)
    policy = lab.policy(config)
    policy.load_checkpoint(tmp_path / "step-2")
    again, state_again = exported(policy), policy.call("run", optimizer_state)[0]
    assert [name for name in weights if not torch.equal(again[name], weights[name])] == []
    assert len(state) > len(weights)
    assert [name for name in state if not torch.equal(state_again[name], state[name])] == []
    # Attention adds up gradients in any order, and early steps of Adam are as large for a tiny
    # gradient as for a large one.
    check_training(train(policy, 2), updates, tolerance=1e-3)


def optimizer_state(rank):
    """Each tensor of the optimizer's state on this rank, by the numbers of group and parameter."""
    found = {}
    optimizer = rank.engine.optimizer
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter, state in chained.optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value):
                    found[f"{len(found)} {name} {tuple(parameter.shape)}"] = value.cpu().clone()
    return found


@pytest.mark.skipif(DEVICE == "cpu", reason="needs Transformer Engine's optimizer")
@pytest.mark.parametrize(
    "options",
    [
        {},
        OPTIONS["precision aware"],
        OPTIONS["moments in bf16"],
        OPTIONS["moments in fp8"],
        OPTIONS["weights in fp16"],
        OPTIONS["offload half"],
        FP8["parameters"],
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "none",
)
def test_a_snapshot_is_put_back_to_the_bit(lab, model, options):
    policy = lab.policy(config_of(model, **options))
    train(policy, 2)
    ((snapshot, _),) = [actor.take_snapshot.remote(2) for actor in policy.actors.values()]
    ray.wait([snapshot], fetch_local=False)
    weights, state = exported(policy), policy.call("run", optimizer_state)[0]
    updates = train(policy, 2)
    policy = lab.policy(config_of(model, **options))
    policy.call("restore_snapshot", snapshot)
    policy.policy_version = 2
    again, state_again = exported(policy), policy.call("run", optimizer_state)[0]
    assert [name for name in weights if not torch.equal(again[name], weights[name])] == []
    assert [name for name in state if not torch.equal(state_again[name], state[name])] == []
    check_training(train(policy, 2), updates, tolerance=1e-3)  # sums are added up in any order


@pytest.mark.skipif(DEVICE == "cpu", reason="needs Transformer Engine's optimizer")
@pytest.mark.parametrize("name", ["weights in fp16", "moments in fp8"])
def test_a_resume_rounds_the_state_once_more(lab, model, tmp_path, name):
    config = config_of(model, **OPTIONS[name])
    policy = lab.policy(config)
    train(policy, 2)
    (tmp_path / "step-2").mkdir()
    policy.save_checkpoint(tmp_path / "step-2")
    updates = train(policy, 2)
    policy = lab.policy(config)
    policy.load_checkpoint(tmp_path / "step-2")
    check_training(train(policy, 2), updates, tolerance=5e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs Transformer Engine's optimizer")
def test_a_checkpoint_of_an_offloaded_optimizer_continues_on_the_gpu(lab, model, tmp_path):
    policy = lab.policy(config_of(model, **OPTIONS["offload half"]))
    train(policy, 2)
    (tmp_path / "step-2").mkdir()
    policy.save_checkpoint(tmp_path / "step-2")
    updates = train(policy, 2)
    policy = lab.policy(config_of(model))
    policy.load_checkpoint(tmp_path / "step-2")
    check_training(train(policy, 2), updates, tolerance=5e-3)
