"""Trackers: they record metrics and completions.

A new tracker is one file with a class under `@register_tracker("name")`, imported below.
"""

# Imported to be registered.
from rlsys.tracking import mlflow, swanlab, tensorboard, trackio, wandb  # noqa: F401
from rlsys.tracking.base import Metrics, Split, Tracker, register_tracker, trackers
from rlsys.tracking.composite import build_tracker

__all__ = ["Metrics", "Split", "Tracker", "build_tracker", "register_tracker", "trackers"]
