"""Rollout engines get the policy's weights: one plan, one checksum, one transport interface."""
