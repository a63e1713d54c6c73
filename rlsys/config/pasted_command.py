"""A whole command of another project behind `rlsys grpo`: its program, and what it is here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

from rlsys.config.hints import hint

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*=.*", re.DOTALL)
_PROJECTS = {
    "swift": "ms-swift",
    "megatron": "ms-swift",
    "trl": "TRL",
    "verl": "verl",
    "openrlhf": "OpenRLHF",
}
"""Program or package -> project."""
_LAUNCHER = re.compile(r"python[\d.]*|torchrun|accelerate|deepspeed|uv|ray|env|nohup")
_LAUNCHING_MODULES = ("torch.distributed", "accelerate")
_PROCESSES = re.compile(r"--(nproc[-_]per[-_]node|num_processes|num_gpus)(?:=(?P<value>.+))?")


@dataclass(frozen=True, slots=True)
class PastedCommand:
    """The words behind CONFIG, without another project's program in front of its options."""

    program: list[str]
    """`swift rlhf`, or `torchrun --nproc_per_node 8 train.py`; empty for an rlsys command."""
    variables: list[str]
    """`NAME=value` words before or between the words of the program that rlsys has no field for."""
    options: list[str]
    project: str | None
    """Whose program it is, where its name says so."""

    def problems(self) -> list[str]:
        """What to do with the words that are not options."""
        found = [
            f"{word}: is a variable of the environment: write it before `rlsys`"
            for word in self.variables
        ]
        if self.program:
            found.append(f"{shlex.join(self.program)}: leave it out, `rlsys` is the program")
        return found


def split_command(words: Sequence[str]) -> PastedCommand:
    """Take variables of the environment and the program away from the front."""
    rest = list(words)
    program: list[str] = []
    variables: list[str] = []
    while rest:
        if _VARIABLE.fullmatch(rest[0]):
            variables.append(rest.pop(0))
            continue
        length = _program_length(rest)
        if not length:
            break
        program += rest[:length]
        del rest[:length]
    variables += [f"NPROC_PER_NODE={number}" for number in _processes(program)]
    known = [word for word in variables if hint(word.partition("=")[0])]
    packages = [Path(word).name.partition(".")[0] for word in program]
    return PastedCommand(
        program,
        [word for word in variables if word not in known],
        known + rest,
        next((_PROJECTS[name] for name in packages if name in _PROJECTS), None),
    )


def _program_length(words: list[str]) -> int:
    """How many words the program in front has; 0 where an option is in front."""
    name = Path(words[0]).name
    if name.endswith(".py") and "=" not in name:
        return 1
    if _LAUNCHER.fullmatch(name):
        for index, (word, after) in enumerate(pairwise([*words, ""])):
            if word == "-m" and not after.startswith(_LAUNCHING_MODULES):
                return index + 2
            if word == "--" or (word.endswith(".py") and not word.startswith("-")):
                return index + 1
    elif name not in _PROJECTS:
        return 0
    return 1 + sum(1 for _ in takewhile(_is_command_word, words[1:]))


def _is_command_word(word: str) -> bool:
    return not word.startswith("-") and "=" not in word and Path(word).name not in _PROJECTS


def _processes(program: list[str]) -> list[str]:
    """The number of processes that a launcher was to start."""
    found = [
        match["value"] or after
        for word, after in pairwise([*program, ""])
        if (match := _PROCESSES.fullmatch(word))
    ]
    return [text for text in found if text]
