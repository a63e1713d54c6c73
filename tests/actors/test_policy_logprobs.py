"""Log-probs of the policy equal those of transformers, for every architecture and layout.

This process imports no megatron: what it compares with is transformers on an unpatched torch.
"""

import pytest
import torch
from policy_cases import LAYOUTS, MODELS, padded_logprobs, policy_config, random_batch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def expected(policy_models):
    """[N, S] log-probs of transformers, by model."""
    batch = random_batch()
    with torch.no_grad():
        return {
            name: padded_logprobs(
                AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch
            )
            for name, folder in policy_models.items()
        }


@pytest.mark.parametrize(
    "layout",
    ["one rank", "TP 2", "PP 2", "DP 2", pytest.param("TP 2 x PP 2", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_equal_those_of_transformers(lab, policy_models, expected, name, layout):
    policy = lab.policy(policy_config(policy_models[name], **LAYOUTS[layout]))
    logprobs = policy.compute_logprobs(random_batch())[0]
    torch.testing.assert_close(logprobs, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["one rank", "TP 2"])
def test_an_fp32_head_differs_by_what_bfloat16_rounds_off_logits(lab, policy_models, layout):
    batch = random_batch()

    def logprobs(dtype, fp32_lm_head):
        config = policy_config(policy_models["qwen3-untied"], dtype=dtype, **LAYOUTS[layout])
        model = config.model.model_copy(update={"fp32_lm_head": fp32_lm_head})
        return lab.policy(config.model_copy(update={"model": model})).compute_logprobs(batch)[0]

    rounded, unrounded = (logprobs("bfloat16", fp32) for fp32 in (False, True))
    assert 1e-4 < (rounded - unrounded).abs().mean() < 1e-2
    assert torch.equal(logprobs("float32", True), logprobs("float32", False))


@pytest.mark.parametrize("layout", ["one rank", "CP 2 x DP 2"])
def test_logprobs_do_not_depend_on_packing(lab, policy_models, expected, layout):
    options = LAYOUTS[layout] | {"max_tokens_per_micro_batch": 40}
    config = policy_config(policy_models["qwen3-tied"], **options)
    logprobs = lab.policy(config).compute_logprobs(random_batch())[0]
    torch.testing.assert_close(logprobs, expected["qwen3-tied"], rtol=0, atol=1e-5)


def test_these_models_are_sensitive_to_what_could_be_wrong(policy_models, expected):
    """Temperature, scaled rotary frequencies and biases move log-probs far beyond the tolerance."""
    batch = random_batch()
    model = AutoModelForCausalLM.from_pretrained(policy_models["llama-tied"], dtype=torch.float32)
    with torch.no_grad():
        hotter = padded_logprobs(model, batch, temperature=1.0)
        unscaled = {"rope_type": "default", "rope_theta": 1e4}
        model.config.rope_parameters = unscaled
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        plain = padded_logprobs(model, batch)
        model = AutoModelForCausalLM.from_pretrained(
            policy_models["qwen2-tied"], dtype=torch.float32
        )
        model.model.layers[0].self_attn.q_proj.bias.zero_()
        unbiased = padded_logprobs(model, batch)
    for changed, name in ((hotter, "llama-tied"), (plain, "llama-tied"), (unbiased, "qwen2-tied")):
        assert (changed - expected[name]).abs().max() > 1e-2
