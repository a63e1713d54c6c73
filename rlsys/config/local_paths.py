"""Paths of a config, made absolute in the driver: actors have other working directories."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.config.dataset_spec import is_local_path
from rlsys.config.preference import PreferenceConfig
from rlsys.config.roles import RoleName
from rlsys.config.schema import AnyConfig, Config, ReferenceConfig, RunConfig

JOB_COPY = "working_dir_files"
"""Name of the folder into which `ray job submit --working-dir` unpacks its copy."""


@dataclass(frozen=True, slots=True)
class NeededPath:
    """A file or folder of the driver's that processes of a run need under the same path."""

    path: str
    field: str
    """The config field that names it."""
    roles: tuple[RoleName, ...]
    """Whose processes need it."""
    written: bool = False
    """Whether they write to it, so that a copy on each node would not do."""


def needed_paths(
    config: RunConfig, beside_plugins: Mapping[Path, Sequence[Path]]
) -> list[NeededPath]:
    """What has to be on every node that runs a role, of a config with absolute paths.

    The driver alone reads data. Ids of a hub are left out: each node downloads these.

    Args:
        config: of the run.
        beside_plugins: see `rlsys.plugins.load.files_beside_plugins`.
    """
    needed = [
        NeededPath(
            str(Path(config.output_dir).absolute()), "output_dir", ("policy",), written=True
        ),
        NeededPath(config.model.path, "model.path", ("policy", "rollout")),
    ]
    if config.policy.lora is not None and config.policy.lora.path is not None:
        needed.append(NeededPath(config.policy.lora.path, "policy.lora.path", ("policy",)))
    plugins: dict[str, tuple[list[str], tuple[RoleName, ...]]] = {
        "data.external_plugins": (config.data.external_plugins, ("reward", "reward_model"))
    }
    if isinstance(config, Config | PreferenceConfig):
        needed.append(NeededPath(config.reference_path, "reference.path", ("reference",)))
    if isinstance(config, Config):
        needed += _needed_by_rewards(config)
        own = config.reward.external_plugins
        plugins["reward.external_plugins"] = (own, ("reward", "reward_model"))
        plugins["grpo.external_plugins"] = (config.grpo.external_plugins, ("policy",))
    if config.teacher_path is not None:
        # The policy's ranks read its output weight.
        needed.append(NeededPath(config.teacher_path, "teacher.path", ("policy", "teacher")))
    for field, (paths, roles) in plugins.items():
        folders = dict.fromkeys(Path(path).resolve().parent for path in paths)
        beside = [file for folder in folders for file in beside_plugins.get(folder, ())]
        needed += [NeededPath(str(path), field, roles) for path in [*paths, *beside]]
    unique = {(one.path, one.roles): one for one in reversed(needed)}
    return [one for one in reversed(unique.values()) if one.written or Path(one.path).exists()]


def _needed_by_rewards(config: Config) -> Iterator[NeededPath]:
    for path in config.reward.model_paths:
        yield NeededPath(path, "reward.reward_model", ("reward_model",))
    for name in config.reward.names:
        file = name.rpartition(":")[0]
        if file.endswith(".py"):
            yield NeededPath(_absolute(file), "reward.reward_funcs", ("reward",))


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
    """`config` with absolute paths of models and plugins, for actors in any working directory.

    A name such as `org/model` is a folder if one exists here; otherwise it stays, as a hub id.
    """
    updates: dict[str, dict[str, Any]] = {
        "model": {"path": _absolute(config.model.path)},
        "data": {"external_plugins": _all_absolute(config.data.external_plugins)},
    }
    lora = config.policy.lora
    if lora is not None and lora.path is not None:
        lora = lora.model_copy(update={"path": _absolute(lora.path)})
        updates["policy"] = {"lora": lora}
    if config.teacher_path is not None:
        updates["teacher"] = {"path": _absolute(config.teacher_path)}
    if isinstance(config, Config):
        updates |= _of_grpo(config)
    elif isinstance(config, PreferenceConfig):
        updates["reference"] = _of_reference(config.reference)
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
        "reference": _of_reference(config.reference),
        "grpo": {"external_plugins": _all_absolute(config.grpo.external_plugins)},
        "reward": {
            "external_plugins": _all_absolute(reward.external_plugins),
            "reward_params": reward.reward_params | params,
        },
    }


def _of_reference(reference: ReferenceConfig) -> dict[str, Any]:
    return {"path": reference.path and _absolute(reference.path)}


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
