"""The formulas of benchmarks/scaling.py: what has to hold, and how far they are from reality."""

from dataclasses import replace
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling():
    """benchmarks/scaling.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import scaling

        yield scaling


@pytest.fixture
def model(scaling):
    return scaling.model_of("qwen2.5-1.5b")


def test_weights_are_counted_as_the_policy_update_benchmark_counts_them(scaling, model):
    assert model.products == pytest.approx(1.5437e9, rel=1e-4)
    assert model.weights == model.products  # tied
    large = scaling.model_of("qwen2.5-7b")
    assert large.weights - large.products == 3584 * 152064


def test_the_docs_have_every_comparison_with_its_error(scaling):
    page = (REPOSITORY / "docs/scaling.md").read_text()
    for row in scaling.comparison():
        line = f"| {row['what']} | {row['measured_s']:g} | {row['computed_s']:.4g} | "
        assert f"{line}{row['error']:+.0%}" in page


def test_what_the_formulas_were_calibrated_with_they_give_back(scaling):
    errors = {r["what"]: r["error"] for r in scaling.comparison() if r["calibrated_with"]}
    assert max(map(abs, errors.values())) < 0.2
    assert sorted(map(abs, errors.values()))[len(errors) // 2] < 0.01


def test_an_update_takes_the_flops_over_what_a_gpu_reaches(scaling, model):
    job, hardware = scaling.Job(), scaling.Hardware()
    tokens = 1024 * 1056
    flops = tokens * (6 * model.products + 12 * 28 * 1536 * 1056 / 2)
    one = scaling.update_seconds(model, job, hardware, replicas=1)
    rest = one - flops / (0.546 * 990e12)
    assert rest == pytest.approx(scaling.OPTIMIZER_SECONDS * model.weights)
    ideal = [scaling.update_seconds(model, job, hardware, replicas=n) * n for n in (1, 2, 8, 16)]
    assert ideal == sorted(ideal)  # communication is never negative
    steps = scaling.update_seconds(model, replace(job, optimizer_steps=4), hardware, replicas=1)
    assert steps - one == pytest.approx(3 * rest)


def test_a_decode_step_is_never_faster_than_reading_weights_and_cache(scaling, model):
    hardware = scaling.Hardware()
    for prompts in (1, 16, 128):
        job = scaling.Job(prompts=prompts)
        seconds = scaling.rollout_seconds(model, job, hardware, scaling.FAST, gpus=1)
        cache = 4 * 28 * 256 * job.completions * (32 + 512)
        assert seconds > job.length * (2 * model.weights + cache) / hardware.memory_bytes


def test_a_weight_sync_is_slower_over_the_network_and_with_more_engines(scaling, model):
    hardware = scaling.Hardware()
    seconds = [
        scaling.sync_seconds(model, hardware, engines=n, gpus=2 * n) for n in (1, 4, 8, 64, 512)
    ]
    assert seconds == sorted(seconds)
    assert seconds[0] == pytest.approx(0.0134, abs=1e-4)
    assert seconds[2] > 2 * model.weights / hardware.network_bytes  # two hosts
    half = scaling.sync_seconds(model, hardware, engines=1, gpus=4, tensor_parallel=2)
    assert half - scaling.SYNC_SECONDS == pytest.approx((seconds[0] - scaling.SYNC_SECONDS) / 2)


def test_a_step_is_the_sum_of_its_phases_or_of_what_does_not_overlap(scaling, model):
    job, hardware = scaling.Job(), scaling.Hardware()
    found = scaling.step(model, job, hardware, scaling.SLOW, policy_gpus=1, rollout_gpus=1)
    phases = [found[name] for name in ("rollout", "driver", "update", "weight_sync")]
    assert found["step"] == pytest.approx(sum(phases))
    shorter = min(found["rollout"], found["update"])
    assert found["step_with_max_staleness_1"] == pytest.approx(sum(phases) - shorter)
    colocated = scaling.step(model, job, hardware, scaling.SLOW, policy_gpus=1, rollout_gpus=0)
    assert colocated["step"] == colocated["step_with_max_staleness_1"]
    assert colocated["switching"] > 0


@pytest.mark.parametrize("gpus", [1, 2, 8, 64, 1024])
def test_the_best_split_uses_every_gpu(scaling, model, gpus):
    job, hardware = scaling.Job(prompts=1024), scaling.Hardware()
    best = scaling.best_split(model, job, hardware, scaling.FAST, gpus, 1)
    assert best["policy_gpus"] + best["rollout_gpus"] == gpus
    if gpus > 1:
        half = {"policy_gpus": gpus // 2, "rollout_gpus": gpus // 2}
        even = scaling.step(model, job, hardware, scaling.FAST, **half)
        assert best["step_with_max_staleness_1"] <= even["step_with_max_staleness_1"]
