"""Llama 2 and 3, and models that are published as one (SmolLM2)."""

from rlsys.model.families.base import ModelFamily

LLAMA = ModelFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    heads_divide_hidden=True,
    inert={"sliding_window": ()},  # Qwen's configs name one and switch it off; Llama's cannot
)
