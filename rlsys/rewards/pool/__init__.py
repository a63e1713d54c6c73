"""Scoring in processes of their own, which are killed when reward code hangs."""
