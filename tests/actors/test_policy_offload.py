"""A policy that leaves its GPU between any two calls is, to the bit, one that never did."""

import pytest
import torch
from policy_cases import LAYOUTS, exported, policy_config, random_batch, save_policy_model

from rlsys.actors.waiting import ActorFailure

pytestmark = pytest.mark.system

LORA = {"lora": {"rank": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}
OVERLAP = {"overlap_param_gather": True, "overlap_grad_reduce": True}
KINDS = {
    "one rank": LAYOUTS["one rank"] | {"dtype": "bfloat16"},
    "DP 2": LAYOUTS["DP 2"] | OVERLAP | {"dtype": "bfloat16"},
    "LoRA": LORA | {"dtype": "bfloat16"},
}
SLOW_KINDS = {
    "fp32 weights, whole optimizer": {"use_distributed_optimizer": False},
    "bf16 weights, whole optimizer": {"use_distributed_optimizer": False, "dtype": "bfloat16"},
    "PP 2": LAYOUTS["PP 2"],
    "virtual pipeline": LAYOUTS["PP 2"] | {"pipeline_layout": "Et|t|t|tL"},
    "frozen": {"freeze_parameters": ["model.layers.0", "model.embed_tokens"], "dtype": "bfloat16"},
}


def config_of(folder, **policy):
    """Two optimizer steps an update."""
    return policy_config(folder, max_steps=5, global_batch_size=4, **policy)


def existing(folder):
    folder.mkdir()
    return folder


def leave_and_return(policy):
    """What a colocated run does between two turns of the policy; returns what it sends."""
    policy.call("offload_optimizer")
    weights = exported(policy)
    policy.call("offload_weights")
    policy.call("onload")
    return weights


def run(policy, between):
    """Two updates, and everything that can be seen; `between` is called between any two calls."""
    seen = []
    for version in (1, 2):
        batch = random_batch(seed=version)
        batch.old_logprobs, entropies = policy.compute_logprobs(batch)
        between(policy)
        seen += [batch.old_logprobs, entropies]
        metrics = policy.update(batch).metrics
        seen.append(torch.tensor([metrics[name] for name in sorted(metrics)]))
        between(policy)
    return seen, exported(policy), policy.call("optimizer_state")


def check_equal(found, expected):
    assert all(map(torch.equal, found[0], expected[0]))
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())
    check_states(found[2], expected[2])


def check_states(found, expected):
    """Optimizer states of all ranks."""
    for state, expected_state in zip(found, expected, strict=True):
        for one, expected_one in zip(state, expected_state, strict=True):
            assert one.keys() == expected_one.keys() > {"parameter"}
            different = [name for name in one if not torch.equal(one[name], expected_one[name])]
            assert not different


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)]
)
def test_leaving_between_any_two_calls_changes_no_bit(lab, policy_models, tmp_path, kind):
    folder = policy_models["qwen3-untied"]
    if kind == "virtual pipeline":
        folder = tmp_path / "four-layers"
        save_policy_model(folder, "qwen3-untied", num_layers=4)
    config = config_of(folder, **(KINDS | SLOW_KINDS)[kind])
    stayed = run(lab.policy(config), lambda policy: None)
    policy = lab.policy(config)
    policy.call("move_on_cpu")
    check_equal(run(policy, leave_and_return), stayed)
    assert torch.equal(leave_and_return(policy)["lm_head.weight"], stayed[1]["lm_head.weight"])
    policy.save_checkpoint(existing(tmp_path / "step-2"))
    again = lab.policy(config)
    again.load_checkpoint(tmp_path / "step-2")
    check_states(again.call("optimizer_state"), stayed[2])


REFUSED = {
    "offload_optimizer": ("update", "begin_checkpoint"),
    "offload_weights": ("update", "compute_logprobs", "save_model", "send_to_nobody"),
}


@pytest.mark.parametrize("left", REFUSED)
def test_a_policy_that_left_refuses_what_it_cannot_compute(lab, policy_models, tmp_path, left):
    """Its memory may be anybody's: numbers would be nonsense."""
    policy = lab.policy(config_of(policy_models["qwen3-untied"]))
    policy.update(random_batch())
    before = exported(policy)
    policy.call(left)
    arguments = {
        "update": (random_batch(), None),
        "compute_logprobs": (random_batch(),),
        "save_model": (tmp_path / "model",),
        "begin_checkpoint": (tmp_path / "checkpoint",),
        "send_to_nobody": (),
    }
    for method in REFUSED[left]:
        with pytest.raises(ActorFailure, match=r"AssertionError: \w+: .*, see onload"):
            policy.call(method, *arguments[method])
    policy.call("onload")
    assert all(torch.equal(tensor, before[name]) for name, tensor in exported(policy).items())
    policy.update(random_batch())


def test_frozen_weights_of_a_checkpoint_replace_those_on_the_host(lab, policy_models, tmp_path):
    """The host has a copy of what no update changes, and keeps it from turn to turn."""
    config = config_of(policy_models["qwen3-untied"], freeze_parameters=["model.embed_tokens"])
    policy = lab.policy(config)
    policy.call("change_weights", False)
    policy.save_checkpoint(existing(tmp_path / "changed"))
    changed = exported(policy)
    policy = lab.policy(config)
    policy.call("move_on_cpu")
    first = leave_and_return(policy)
    policy.load_checkpoint(tmp_path / "changed")
    leave_and_return(policy)
    found = exported(policy)
    assert all(torch.equal(found[name], tensor) for name, tensor in changed.items())
    assert not torch.equal(found["model.embed_tokens.weight"], first["model.embed_tokens.weight"])


def test_memory_is_free_while_the_policy_is_away(lab, policy_models):
    """Moved on the CPU, too: what may not be read has no memory."""
    policy = lab.policy(config_of(policy_models["qwen3-untied"], dtype="bfloat16"))
    policy.call("move_on_cpu")
    policy.update(random_batch())
    (held,) = policy.call("held_bytes")
    weights, gradients, state = held
    assert gradients == 2 * weights
    assert state > 5.9 * weights  # whose buffer is padded
    policy.call("offload_optimizer")
    assert policy.call("held_bytes") == [[weights, 0, state]]  # until it is copied
    policy.call("offload_weights")
    assert policy.call("held_bytes") == [[0, 0, 0]]
    policy.call("onload")
    assert policy.call("held_bytes") == [held]


def test_experts_have_an_optimizer_of_their_own(lab, mixtures):
    config = config_of(mixtures[True], **LAYOUTS["DP 2"], expert_model_parallel_size=2)
    stayed = run(lab.policy(config), lambda policy: None)
    policy = lab.policy(config)
    policy.call("move_on_cpu")
    check_equal(run(policy, leave_and_return), stayed)
