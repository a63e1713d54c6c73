"""A resumed policy goes on as if nothing had happened."""

import pytest
import torch
from family_models import save_family_model
from policy_cases import LAYOUTS, exported, policy_config, random_batch
from resume_cases import SCHEDULE, resume, run_and_save, update

pytestmark = pytest.mark.system


def config_of(policy_models, model="qwen3-tied", **policy):
    """Two optimizer steps an update, in an order that is drawn from the version."""
    return policy_config(
        policy_models[model], max_steps=5, global_batch_size=4, **SCHEDULE, **policy
    )


@pytest.mark.parametrize(
    "options",
    [
        LAYOUTS["one rank"],
        LAYOUTS["one rank"] | {"use_distributed_optimizer": False},
        LAYOUTS["DP 2"],
        LAYOUTS["DP 2"] | {"use_distributed_optimizer": False},
        LAYOUTS["TP 2 x PP 2"],
        # Weights in bfloat16, as on GPUs, with the optimizer's own copy in float32.
        LAYOUTS["DP 2"] | {"dtype": "bfloat16"},
        LAYOUTS["TP 2"] | {"dtype": "bfloat16", "use_distributed_optimizer": False},
    ],
    ids=str,
)
def test_resume_is_exact(lab, policy_models, tmp_path, options):
    config = config_of(policy_models, **options)
    metrics, weights = run_and_save(lab, config, tmp_path / "step-2")
    metrics_again, weights_again = resume(lab, config, tmp_path / "step-2")
    assert metrics_again == metrics
    assert weights_again.keys() == weights.keys()
    assert all(torch.equal(weights_again[name], weights[name]) for name in weights)
    assert metrics[0]["learning_rate"] > metrics[1]["learning_rate"]


@pytest.mark.parametrize(
    ("first", "layout"),
    [
        ("DP 2", "one rank"),
        ("DP 2", "TP 2"),
        ("TP 2", "one rank"),  # without the rows that fill the vocabulary up
        ("DP 2", "PP 2"),
        ("DP 2", "TP 2 x DP 2"),
    ],
)
def test_another_layout_goes_on_from_the_same_place(lab, policy_models, tmp_path, first, layout):
    config = config_of(policy_models, **LAYOUTS[first])
    other = config_of(policy_models, **LAYOUTS[layout])
    assert_goes_on(lab, config, other, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("olmo2", {}),  # norms over all heads, which are cut
        # Layers without experts; a bias of k gets a gradient of rounding errors only.
        ("glm4_moe-qk-norm", {"expert_model_parallel_size": 2}),
        ("deepseek_v3", {"expert_model_parallel_size": 2}),  # linear layers that are not cut
    ],
)
def test_what_families_have_of_their_own_goes_on_in_another_layout(lab, tmp_path, name, experts):
    save_family_model(tmp_path / name, name)
    models = {name: tmp_path / name}
    # The bias of a key moves no attention but by its rotary part. The gradient of the rest is
    # rounding, which AdamW's usual epsilon would make steps of.
    first = config_of(models, name, adam_eps=1e-5, **LAYOUTS["TP 2"], **experts)
    other = config_of(models, name, adam_eps=1e-5, **LAYOUTS["one rank"])
    assert_goes_on(lab, first, other, tmp_path)


def assert_goes_on(lab, first, other, tmp_path):
    """A policy in another layout takes the checkpoint of the first one, and the same steps."""
    metrics, weights = run_and_save(lab, first, tmp_path / "step-2")
    metrics_again, weights_again = resume(lab, other, tmp_path / "step-2")
    for again, expected in zip(metrics_again, metrics, strict=True):
        assert again == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in weights_again.items():
        # Weights in bfloat16 may round another way.
        bound = 1e-5 if first.model.dtype != "bfloat16" else 1e-2
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=bound, msg=name)


def test_a_resumed_run_takes_its_learning_rate_from_the_config(lab, policy_models, tmp_path):
    """The checkpoint has the rates of its own run, too."""
    run_and_save(lab, config_of(policy_models, lr=1e-3), tmp_path / "step-2")
    changed = config_of(policy_models, lr=2e-3)
    metrics, _ = resume(lab, changed, tmp_path / "step-2")
    expected, _ = run_and_save(lab, changed, tmp_path / "changed")
    assert [m["learning_rate"] for m in metrics] == [m["learning_rate"] for m in expected]


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(
    ("first", "other", "dtype"),
    [
        ("DP 2", "DP 2", "float32"),
        ("DP 2", "DP 2", "bfloat16"),
        ("TP 2", "one rank", "float32"),
        ("one rank", "PP 2", "float32"),
    ],
)
def test_an_optimizer_of_the_other_kind_goes_on(
    lab, policy_models, tmp_path, first, other, dtype, distributed
):
    """The float32 weights have another name, or are not in the checkpoint at all."""
    kinds = [
        config_of(policy_models, dtype=dtype, use_distributed_optimizer=kind, **LAYOUTS[layout])
        for kind, layout in ((distributed, first), (not distributed, other))
    ]
    assert_goes_on(lab, *kinds, tmp_path)


def test_what_is_resumed_is_more_than_the_weights(lab, policy_models, tmp_path):
    """The bounds above would notice an optimizer or a schedule that started again."""
    config = config_of(policy_models)
    metrics, weights = run_and_save(lab, config, tmp_path / "step-2")
    policy = lab.policy(config)
    update(policy, [1, 2])
    policy.save_model(tmp_path / "weights")
    model = config.model.model_copy(update={"path": str(tmp_path / "weights")})
    restarted = lab.policy(config.model_copy(update={"model": model}))
    rates = []
    for version in (3, 4):
        batch = random_batch(seed=version)
        batch.old_logprobs = restarted.compute_logprobs(batch)[0]
        rates.append(restarted.update(batch).metrics["learning_rate"])
    assert rates != [update["learning_rate"] for update in metrics]
    restarted_weights = exported(restarted)
    assert all((restarted_weights[name] - weights[name]).abs().max() > 1e-4 for name in weights)
