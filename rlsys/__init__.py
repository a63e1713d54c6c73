"""GRPO for language models: Ray, megatron-core, vLLM, one readable loop."""
