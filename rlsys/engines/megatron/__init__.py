"""The trained and the frozen model on megatron-core. No Ray."""
