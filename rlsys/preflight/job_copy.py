"""The files of a run that a Ray job did not send to the cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.config.dataset_spec import parse_spec
from rlsys.config.local_paths import is_in_job_copy
from rlsys.problems import Problem


def job_copy_problems(config: RunConfig) -> Iterator[Problem]:
    """Paths that Ray left out of this job's copy of the working directory."""
    left_out = left_out_of_job_copy(config)
    if left_out:
        yield Problem(
            f"{', '.join(left_out)}: not in this job's copy of the working directory, from "
            "which Ray leaves out what .gitignore and .rayignore name. Run in the folder "
            'itself, `ray job submit -- env -C "$PWD" rlsys grpo ...`, where the cluster has '
            "it under the same path, or give absolute paths; RAY_RUNTIME_ENV_IGNORE_GITIGNORE="
            "1 for `ray job submit` sends them, up to 512 MiB",
            only_here=True,
        )


def left_out_of_job_copy(config: RunConfig) -> list[str]:
    """Paths of `config` that Ray did not send with the working directory of this job."""
    here = Path.cwd()
    if not is_in_job_copy(here):
        return []
    return [path for path in paths_read(config) if _is_left_out(here, path)]


def paths_read(config: RunConfig) -> list[str]:
    """Each path or hub id that a run reads, once: models, plugins and data."""
    paths = [*config.model_paths, *config.plugins]
    paths += [parse_spec(spec).name for spec in config.data.all_datasets]
    return list(dict.fromkeys(paths))


def _is_left_out(here: Path, path: str) -> bool:
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    place = Path(os.path.normpath(here / path))
    if place.exists() or not place.is_relative_to(here):
        return False
    # Ray asks the patterns of a folder about everything below it, folders first.
    steps = [step for step in (place, *place.parents) if step.is_relative_to(here)]
    return any(
        exclude(step)
        for number, folder in enumerate(steps)
        for exclude in get_excludes_from_ignore_files(folder, True, logging.getLogger(__name__))
        for step in steps[:number]
    )
