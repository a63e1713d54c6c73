"""The rollout engine on vLLM. No Ray."""
