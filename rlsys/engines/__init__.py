"""One model in one process, on megatron-core or vLLM. No Ray."""
