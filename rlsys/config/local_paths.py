"""Paths of a config, made absolute in the driver: actors have other working directories."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from rlsys.config.dataset_spec import is_local_path
from rlsys.config.schema import AnyConfig, Config

JOB_COPY = "working_dir_files"
"""Name of the folder into which `ray job submit --working-dir` unpacks its copy."""


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
    """`config` with absolute paths of models and plugins, for actors in any working directory.

    A name such as `org/model` is a folder if one exists here; otherwise it stays, as a hub id.
    """
    updates: dict[str, dict[str, Any]] = {
        "model": {"path": _absolute(config.model.path)},
        "data": {"external_plugins": _all_absolute(config.data.external_plugins)},
    }
    if isinstance(config, Config):
        updates |= _of_grpo(config)
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=values)
            for section, values in updates.items()
        }
    )


def _of_grpo(config: Config) -> dict[str, dict[str, Any]]:
    reward = config.reward
    params = {
        name: reward.params[name] | {"path": _absolute(reward.params[name]["path"])}
        for name in reward.models
        if isinstance(reward.params.get(name, {}).get("path"), str)
    }
    speculation = config.rollout.speculative_config
    if (draft := config.rollout.draft_model) is not None:
        speculation = config.rollout.speculation | {"model": _absolute(draft)}
    return {
        "rollout": {"speculative_config": speculation},
        "reference": {"path": config.reference.path and _absolute(config.reference.path)},
        "grpo": {"external_plugins": _all_absolute(config.grpo.external_plugins)},
        "reward": {
            "external_plugins": _all_absolute(reward.external_plugins),
            "reward_params": reward.reward_params | params,
        },
    }


def check_is_here(path: str) -> None:
    """Refuse a folder that the driver has and this machine lacks.

    Raises:
        ValueError: it names this host and the folder.
    """
    if is_local_path(path) and not Path(path).is_dir():
        raise ValueError(
            f"host {socket.gethostname()} has no folder {path}: models have to be where every "
            "host of the cluster finds them under the same path, on a shared disk say"
        )


def is_in_job_copy(path: Path) -> bool:
    """Whether `path` is in what `ray job submit --working-dir` sent to the cluster."""
    return JOB_COPY in path.parts


def _absolute(path: str) -> str:
    place = Path(path).expanduser()
    return str(place.absolute()) if place.exists() else path


def _all_absolute(paths: list[str]) -> list[str]:
    return [_absolute(path) for path in paths]
