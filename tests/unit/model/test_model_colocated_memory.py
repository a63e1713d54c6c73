"""Who holds what in which phase on a GPU that policy and engines share, and what waits outside."""

import json
from pathlib import Path

import pytest
from config_cases import write_config, write_model
from published_models import QWEN_2_5

from rlsys.config.load import load_config
from rlsys.model.colocated_memory import colocated_phases, pinned_gib, weights_leave
from rlsys.model.host_memory import SLAB_BYTES, slab_sizes
from rlsys.model.memory import GIB, estimate_memory
from rlsys.model.shape import read_model_shape
from rlsys.preflight.memory import gpu_warnings, host_warnings

GPU_MD = Path(__file__).parents[3] / "docs/gpu.md"
CARD_GIB = 79.6
"""What nvidia-smi says of a GPU of 80 GB."""
RUNS = {
    "1.5B, all weights": ("Qwen2.5-1.5B", {}),
    "3B, all weights": ("Qwen2.5-3B", {"recompute": "full"}),
    "7B, LoRA of rank 32": ("Qwen2.5-7B", {"lora": {"rank": 32}, "recompute": "full"}),
}
"""Rows of the table in docs/gpu.md."""


def colocated(tmp_path, model, policy, **sections):
    """Config, shape and estimates of a run on one GPU."""
    folder = tmp_path / "model"
    if not folder.exists():
        write_model(folder, **QWEN_2_5[model])
    rollout = {"num_generations": 8, "generation_batch_size": 512, "max_completion_length": 1024}
    config = load_config(
        write_config(
            tmp_path,
            placement="colocated",
            policy={"max_tokens_per_micro_batch": 8192} | policy,
            rollout=rollout | sections.pop("rollout", {}),
            **sections,
        )
    ).config
    shape = read_model_shape(folder)
    return config, shape, estimate_memory(config, shape, shape, device="cuda")


def phases_of(config, estimates, gpu_gib=CARD_GIB):
    return {phase.name: phase for phase in colocated_phases(config, estimates, gpu_gib)}


def row(name, config, shape, estimates):
    """A line of the table in docs/gpu.md."""
    phases = phases_of(config, estimates)
    totals = [phases[phase].total_gib for phase in ("rollout", "update", "weight sync")]
    stays = phases["rollout"].gib["policy (what stays)"]
    host = sum(pinned_gib(config, shape, estimates, CARD_GIB).values())
    cells = [name, *(f"{gib:.1f}" for gib in (totals[0], stays, *totals[1:], host))]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_the_docs_is_what_is_estimated(tmp_path):
    """They fit: these are the runs that one GPU of 80 GB has to hold."""
    rows = []
    for name, (model, policy) in RUNS.items():
        (tmp_path / name).mkdir()
        config, shape, estimates = colocated(tmp_path / name, model, policy)
        rows.append(row(name, config, shape, estimates))
        assert not gpu_warnings(config, estimates, CARD_GIB)
    assert "\n".join(rows) in GPU_MD.read_text(), "\n".join(rows)


def test_phases_are_sums_of_what_each_side_holds(tmp_path):
    config, shape, estimates = colocated(tmp_path, "Qwen2.5-1.5B", {})
    phases = phases_of(config, estimates)
    number = shape.num_params / GIB
    process, bucket = 1.5, 2 * max(256 * 2**20, shape.embedding_params * 2) / GIB
    at_work = sum(estimates[0].gib[purpose] for purpose in ("activations", "logits"))
    idle = process + bucket
    # bf16 weights on both sides, and fp32 moments and copy that are on their way to the host.
    assert phases["weight sync"].total_gib == pytest.approx(2 * idle + 16 * number, rel=1e-3)
    # Weights, fp32 gradients, state; the engine has what its process keeps.
    assert phases["update"].total_gib == pytest.approx(2 * idle + 18 * number + at_work, rel=1e-3)
    rollout = 0.85 * CARD_GIB + idle + 2 * number  # small weights stay
    assert phases["rollout"].total_gib == pytest.approx(rollout, rel=1e-3)
    assert sum(pinned_gib(config, shape, estimates, CARD_GIB).values()) == pytest.approx(
        12 * number, abs=0.5
    )


def test_weights_leave_by_the_size_of_the_gpu(tmp_path):
    config, _, (policy, *_) = colocated(tmp_path, "Qwen2.5-3B", {})
    assert policy.gib["weights"] == pytest.approx(5.75, abs=0.01)
    assert not weights_leave(config, policy, 79.6)
    assert weights_leave(config, policy, 47.5)
    assert not weights_leave(config, policy, None)


@pytest.mark.parametrize(
    ("sections", "phase", "less"),
    [
        ({"colocated": {"offload_weights": True}}, "rollout", 5.75),
        ({"colocated": {"offload_optimizer": False}}, "rollout", -34.5),
        ({"rollout": {"gpu_memory_utilization": 0.5}}, "rollout", 0.35 * CARD_GIB),
        ({"rollout": {"kv_cache_memory_mb": 10240}}, "rollout", 0.85 * CARD_GIB - 20.4),
    ],
)
def test_each_knob_changes_its_phase(tmp_path, sections, phase, less):
    config, _, estimates = colocated(tmp_path, "Qwen2.5-3B", {})
    before = phases_of(config, estimates)[phase].total_gib
    config, _, estimates = colocated(tmp_path, "Qwen2.5-3B", {}, **sections)
    assert before - phases_of(config, estimates)[phase].total_gib == pytest.approx(less, abs=0.1)


def test_a_reference_on_the_same_gpu_has_a_phase_and_waits_on_the_host(tmp_path):
    config, shape, estimates = colocated(tmp_path, "Qwen2.5-1.5B", {}, grpo={"beta": 0.1})
    phases = phases_of(config, estimates)
    assert list(phases) == ["rollout", "reference", "update", "weight sync"]
    assert phases["rollout"].gib["reference (its process)"] == 1.5
    assert phases["reference"].gib["reference"] > 2.8
    waiting = pinned_gib(config, shape, estimates, CARD_GIB)
    assert waiting["the reference's weights"] == pytest.approx(2.88, abs=0.01)


@pytest.mark.parametrize(
    ("gpu_gib", "policy", "words"),
    [
        (47.5, {}, ["in the phase update", "set policy.lora, or raise policy.world_size"]),
        (79.6, {}, ["in the phase update", "set policy.recompute to full or lower policy.max_t"]),
        (23.6, {"lora": {"rank": 32}}, ["in the phase rollout", "lower rollout.gpu_memory_util"]),
        (9.0, {"lora": {"rank": 32}}, ["in the phase weight sync", "policy.world_size"]),
    ],
)
def test_a_phase_that_does_not_fit_is_named_with_its_knob(tmp_path, gpu_gib, policy, words):
    config, _, estimates = colocated(tmp_path, "Qwen2.5-3B", policy)
    if "rollout" in words[0]:
        rollout = config.rollout.model_copy(update={"gpu_memory_utilization": 0.95})
        config = config.model_copy(update={"rollout": rollout})
    warnings = gpu_warnings(config, estimates, gpu_gib)
    assert any(all(word in warning for word in words) for warning in warnings), warnings


def test_a_host_with_too_little_memory_is_named_before_the_run(tmp_path):
    config, shape, estimates = colocated(tmp_path, "Qwen2.5-3B", {})
    assert not list(host_warnings(config, shape, estimates, CARD_GIB, 64.0))
    (warning,) = host_warnings(config, shape, estimates, CARD_GIB, 32.0)
    assert "34.5 GiB of pinned host memory" in warning
    assert "colocated.offload_optimizer" in warning
    dedicated = config.model_copy(update={"placement": "dedicated"})
    assert not list(host_warnings(dedicated, shape, estimates, CARD_GIB, 1.0))


def test_engines_that_get_an_adapter_keep_the_base_on_the_host(tmp_path):
    config, shape, estimates = colocated(tmp_path, "Qwen2.5-1.5B", {"lora": {"rank": 8}})
    waiting = pinned_gib(config, shape, estimates, CARD_GIB)
    assert waiting["the engines' base weights"] == pytest.approx(2.88, abs=0.01)


def test_slabs_are_powers_of_two_that_hold_what_is_asked():
    assert list(slab_sizes(0)) == []
    assert list(slab_sizes(1)) == [1]
    assert list(slab_sizes(2 * SLAB_BYTES + 3)) == [SLAB_BYTES, SLAB_BYTES, 4]
    for num_bytes in (5, 511, SLAB_BYTES - 1, SLAB_BYTES, 3 * SLAB_BYTES + 12345):
        sizes = list(slab_sizes(num_bytes))
        assert num_bytes <= sum(sizes) < num_bytes + max(sizes)
        assert all(size.bit_count() == 1 for size in sizes)


def test_sizes_are_those_of_the_published_models(tmp_path):
    billions = []
    for model in QWEN_2_5:
        write_model(tmp_path / model, **QWEN_2_5[model])
        assert json.loads((tmp_path / model / "config.json").read_text())["head_dim"] == 128
        billions.append(round(read_model_shape(tmp_path / model).num_params / 1e9, 2))
    assert billions == [1.54, 3.09, 7.62]
