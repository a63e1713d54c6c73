"""Seed-OSS, dense: a Llama whose q, k and v have biases."""

from rlsys.model.families.base import ModelFamily

SEED_OSS = ModelFamily(
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    inert={
        "attention_bias": (True,),
        "attention_out_bias": (False,),
        # Dropout, which the published models name; a policy is trained without any.
        "attention_dropout": (0, 0.1),
        "residual_dropout": (0, 0.1),
        "sliding_window": (),
    },
    defaults={"num_key_value_heads": 8, "head_dim": 128},
    constants={"has_qkv_bias": True},
)
