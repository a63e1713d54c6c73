"""GRPO for language models: Ray, megatron-core, vLLM, one readable loop."""

__version__ = "0.1.0"
