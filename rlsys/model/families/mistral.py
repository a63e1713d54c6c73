"""Mistral, dense: its tensors are named as Llama's."""

from rlsys.model.families.base import ModelFamily

MISTRAL = ModelFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={"num_key_value_heads": 8},
    inert={"sliding_window": ()},
)
