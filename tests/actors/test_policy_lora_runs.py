"""Updates of adapters and of partly frozen models: what moves, what is saved, what is resumed."""

import pytest
import torch
from family_models import save_family_model
from lora_cases import base_model, peft_model, save_peft_adapter
from policy_cases import LAYOUTS, exported, padded_logprobs, policy_config, random_batch
from resume_cases import SCHEDULE, resume, run_and_save, update
from safetensors.torch import load_file

from rlsys.actors.waiting import ActorFailure

pytestmark = pytest.mark.system

LORA = {"rank": 4, "alpha": 6.0}


def lora_config(folder, lora=LORA, **policy):
    """Two optimizer steps an update, in an order that is drawn from the version."""
    return policy_config(
        folder, max_steps=5, global_batch_size=4, lora=lora, **SCHEDULE, **{"lr": 1e-2} | policy
    )


def adapters(policy):
    return policy.call("adapters")[0]


@pytest.mark.parametrize(
    "layout", ["one rank", *(pytest.param(x, marks=pytest.mark.slow) for x in ("TP 2", "PP 2"))]
)
def test_updates_move_the_adapters_and_never_the_base(lab, policy_models, tmp_path, layout):
    folder, batch = policy_models["qwen3-untied"], random_batch()
    policy = lab.policy(lora_config(folder, **LAYOUTS[layout]))
    before = padded_logprobs(base_model(folder), batch).detach()
    # B of a new adapter is 0.
    torch.testing.assert_close(policy.compute_logprobs(batch)[0], before, rtol=0, atol=1e-5)
    update(policy, [1, 2])
    after = policy.compute_logprobs(batch)[0]
    assert (after - before).abs().max() > 0.1
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in exported(policy).items())

    # PEFT opens what is saved, and merges it as rlsys does.
    policy.save_model(tmp_path / "final")
    assert {file.name for file in (tmp_path / "final").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    model = peft_model(folder, tmp_path / "final")
    with torch.no_grad():
        torch.testing.assert_close(padded_logprobs(model, batch), after, rtol=0, atol=2e-5)
    expected = model.merge_and_unload().state_dict()
    merged = policy.call("merged")[0]
    assert merged.keys() == stored.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)

    # Without the adapter the model is the base, and with it again as before.
    results = [result for result in policy.call("base_logprobs", batch) if result is not None]
    ((rows, (logprobs, _)),) = results
    torch.testing.assert_close(
        logprobs * batch.completion_mask[rows], before[rows], rtol=0, atol=1e-5
    )
    assert torch.equal(policy.compute_logprobs(batch)[0], after)

    # An adapter that rlsys saved goes on as one of PEFT does.
    again = lab.policy(lora_config(folder, {"path": str(tmp_path / "final")}, **LAYOUTS[layout]))
    assert torch.equal(again.compute_logprobs(batch)[0], after)


def test_the_base_has_no_gradients_and_no_optimizer_state(lab, policy_models):
    policy = lab.policy(lora_config(policy_models["qwen3-tied"]))
    update(policy, [1])
    ((trained, in_buffers, in_states),) = policy.call("trained")
    assert trained == in_buffers == in_states == sum(map(torch.numel, adapters(policy).values()))


def test_modules_to_save_are_the_bases_while_the_adapter_is_off(lab, policy_models, tmp_path):
    folder, batch = policy_models["qwen3-untied"], random_batch()
    lora = LORA | {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    policy = lab.policy(lora_config(folder, lora))
    before = policy.compute_logprobs(batch)[0]
    update(policy, [1, 2])
    after = policy.compute_logprobs(batch)[0]
    assert (after - before).abs().max() > 0.1
    ((rows, (logprobs, _)),) = policy.call("base_logprobs", batch)
    assert torch.equal(logprobs * batch.completion_mask[rows], before[rows])
    assert torch.equal(policy.compute_logprobs(batch)[0], after)
    policy.save_model(tmp_path / "final")
    with torch.no_grad():
        expected = padded_logprobs(peft_model(folder, tmp_path / "final"), batch)
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "options", "lora"),
    [
        ("qwen3-tied", LAYOUTS["one rank"], LORA | {"dropout": 0.2}),
        *(
            pytest.param(*case, id=str(case[1:]), marks=pytest.mark.slow)
            for case in (
                ("qwen3-tied", LAYOUTS["one rank"] | {"use_distributed_optimizer": False}, LORA),
                (
                    "qwen3-tied",
                    LAYOUTS["TP 2 x PP 2"] | {"recompute": "full"},
                    LORA | {"dropout": 0.2},
                ),
                ("qwen3-tied", LAYOUTS["DP 2"] | {"dtype": "bfloat16"}, LORA),
                (
                    "qwen3-tied",
                    LAYOUTS["TP 2 x DP 2"],
                    LORA | {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
                ),
                ("experts", LAYOUTS["DP 2"] | {"expert_model_parallel_size": 2}, LORA),
            )
        ),
    ],
)
def test_resume_is_exact(lab, policy_models, mixtures, tmp_path, model, options, lora):
    folder = mixtures[True] if model == "experts" else policy_models[model]
    config = lora_config(folder, lora, **options)
    metrics, tensors = run_and_save(lab, config, tmp_path / "step-2", read=adapters)
    assert not (tmp_path / "step-2/model.safetensors").exists()
    metrics_again, tensors_again = resume(lab, config, tmp_path / "step-2", read=adapters)
    assert metrics_again == metrics
    assert tensors_again.keys() == tensors.keys()
    assert all(torch.equal(tensors_again[name], tensors[name]) for name in tensors)


def test_a_checkpoint_of_an_adapter_is_for_runs_with_one(lab, policy_models, tmp_path):
    folder = policy_models["qwen3-tied"]
    policy = lab.policy(lora_config(folder))
    (tmp_path / "step-0").mkdir()
    policy.save_checkpoint(tmp_path / "step-0")
    policy = lab.policy(policy_config(folder))
    with pytest.raises(ActorFailure, match=r"step-0 holds an adapter, and policy\.lora says"):
        policy.load_checkpoint(tmp_path / "step-0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "first", "other"),
    [
        ("qwen3-tied", LAYOUTS["TP 2 x PP 2"], LAYOUTS["one rank"]),
        ("qwen3-tied", LAYOUTS["DP 2"], LAYOUTS["TP 2"]),
        ("phi3", LAYOUTS["TP 2"], LAYOUTS["one rank"]),  # q, k and v have one B
        ("phi3", LAYOUTS["one rank"], LAYOUTS["TP 2"]),
        (
            "experts",
            LAYOUTS["TP 2"] | {"expert_model_parallel_size": 2},
            LAYOUTS["one rank"],
        ),
    ],
)
def test_another_layout_goes_on_from_the_same_place(
    lab, policy_models, mixtures, tmp_path, model, first, other
):
    if model == "phi3":
        save_family_model(tmp_path / model, model)
        folder = tmp_path / model
    else:
        folder = mixtures[True] if model == "experts" else policy_models[model]
    settings = {"adam_eps": 1e-5}
    metrics, tensors = run_and_save(
        lab, lora_config(folder, **first, **settings), tmp_path / "step-2", read=adapters
    )
    metrics_again, tensors_again = resume(
        lab, lora_config(folder, **other, **settings), tmp_path / "step-2", read=adapters
    )
    for again, expected in zip(metrics_again, metrics, strict=True):
        assert again == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in tensors_again.items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=2e-5, msg=name)


def test_dropout_is_in_updates_only(lab, policy_models, tmp_path):
    folder, adapter, batch = policy_models["qwen3-tied"], tmp_path / "adapter", random_batch()
    save_peft_adapter(folder, adapter, r=4, lora_alpha=6, target_modules="all-linear")
    lora = {"path": str(adapter)}
    gradients = []
    for dropout in (0.0, 0.5, 0.5):
        policy = lab.policy(lora_config(folder, lora | {"dropout": dropout}))
        expected = padded_logprobs(peft_model(folder, adapter), batch).detach()
        torch.testing.assert_close(policy.compute_logprobs(batch)[0], expected, rtol=0, atol=2e-5)
        gradients.append(policy.call("adapter_gradient", batch, "sft")[0])
    exact, dropped, again = gradients
    assert any((dropped[name] - exact[name]).norm() > 0.1 * exact[name].norm() for name in exact)
    assert all(torch.equal(again[name], dropped[name]) for name in exact)


@pytest.mark.parametrize(
    ("model", "options", "trained"),
    [
        (
            "qwen3-untied",
            {"freeze_parameters": ["model.embed_tokens", "model.layers.0."]},
            lambda name: name.startswith(("model.layers.1.", "model.norm", "lm_head")),
        ),
        pytest.param(
            "qwen3-tied",
            LAYOUTS["TP 2 x PP 2"]
            | {"freeze_parameters_regex": ".*", "trainable_parameters_regex": r"\.mlp\."},
            lambda name: ".mlp." in name,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "qwen3-tied",  # the first stage trains nothing
            LAYOUTS["PP 2"]
            | {"freeze_parameters_ratio": 1.0, "trainable_parameters": ["model.norm"]},
            lambda name: name == "model.norm.weight",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "qwen3-tied",
            LAYOUTS["PP 2"] | {"freeze_parameters": ["model.layers."], "recompute": "full"},
            lambda name: "layers" not in name,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_frozen_stays_bit_equal(lab, policy_models, model, options, trained):
    folder = policy_models[model]
    policy = lab.policy(policy_config(folder, **{"lr": 1e-2} | options))
    update(policy, [1, 2])
    stored = load_file(folder / "model.safetensors")
    moved = {
        name for name, tensor in exported(policy).items() if not torch.equal(tensor, stored[name])
    }
    assert moved == set(filter(trained, stored))


def test_an_adapter_of_another_rank_is_refused_before_it_is_trained(lab, policy_models, tmp_path):
    folder = policy_models["qwen3-tied"]
    save_peft_adapter(folder, tmp_path / "a", r=4, lora_alpha=6, target_modules=["q_proj"])
    lora = {"path": str(tmp_path / "a"), "rank": 8}
    with pytest.raises(ActorFailure, match="has rank = 4, not 8"):
        lab.policy(lora_config(folder, lora))
