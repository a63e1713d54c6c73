"""Prompts in, scored groups out: what the loop sees of rollout engines and rewards."""
