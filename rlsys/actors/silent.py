"""What an actor that does not answer is doing: its stacks, saved where the run's user looks."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray._private.worker
from ray._private.state import state as cluster_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlsys.files import replacing
from rlsys.stacks import Stacks, read_stacks

PATIENCE_S = 30.0
"""Most seconds that an error waits for stacks. Stacks of another host need a process there."""
MOST_ACTORS = 16
"""Stacks of more say little, and each takes time."""

_folder: Path | None = None


def save_stacks_in(folder: Path) -> None:
    """Choose the folder for the stacks of this process's actors; it is made when needed."""
    global _folder
    _folder = folder


def actor_of(ref: Any) -> str:
    """The id of the actor that a reference, or a stream, comes from."""
    task: Any = getattr(ref, "_generator_ref", ref).task_id()
    return str(task.actor_id().hex())


def has_process(actor: str) -> bool:
    """Whether Ray has found a place for the actor of that id, and a process there."""
    return bool(cluster_state.actor_table(actor).get("Pid"))


def explain_silence(actors: Mapping[str, str]) -> str:
    """Save the stacks of actors that do not answer; returns a line about each for an error.

    Never raises, and takes at most `PATIENCE_S`: this is called where something hangs already.

    Args:
        actors: name -> id, of `actor_of`.
    """
    found: dict[str, str] = {}
    threads = [
        threading.Thread(target=_explain, args=(name, actor, found), daemon=True)
        for name, actor in list(actors.items())[:MOST_ACTORS]
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    silent = f"no stacks came within {PATIENCE_S:g} s"
    texts = {name: found.get(name, silent) for name in list(actors)[:MOST_ACTORS]}
    return "".join(f"{name}: {text}\n" for name, text in texts.items() if text)


def _explain(name: str, actor: str, found: dict[str, str]) -> None:
    try:
        row = cluster_state.actor_table(actor)
        node = row.get("Address", {}).get("NodeID")
        if not row:  # a task, which runs in any process
            found[name] = ""
            return
        if row.get("State") == "DEAD" or not row.get("Pid"):
            found[name] = "its process has ended" if row.get("Pid") else "it has no process yet"
            return
        stacks = _read_on(node, row["Pid"])
        saved = f"its stacks are in {_save(name, stacks.text)}" if stacks.text else ""
        problem = f"its process {row['Pid']} {stacks.problem}" if stacks.problem else ""
        found[name] = "; ".join(filter(None, [problem, saved]))
    except Exception as error:  # what went wrong first is the error that matters
        found[name] = f"its stacks could not be saved ({type(error).__name__}: {error})"


def _read_on(node: str, pid: int) -> Stacks:
    if node == ray.get_runtime_context().get_node_id():
        return read_stacks(pid)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(read_stacks)
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    stacks: Stacks = ray.get(
        task.options(scheduling_strategy=strategy).remote(pid), timeout=PATIENCE_S
    )
    return stacks


def _save(name: str, text: str) -> Path:
    # Without a run, beside Ray's own logs.
    folder = _folder or Path(ray._private.worker._global_node.get_logs_dir_path())
    folder.mkdir(parents=True, exist_ok=True)
    stem = "stacks-" + re.sub(r"\W+", "-", name)
    number = sum(1 for _ in folder.glob(f"{stem}-*.txt")) + 1
    path = folder / f"{stem}-{number}.txt"
    with replacing(path) as scratch:
        scratch.write_text(f"{name} at {time.strftime('%F %T')}\n\n{text}\n")
    return path
