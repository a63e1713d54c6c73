"""Streams of prompts: in memory, read while training, weighted by difficulty."""
