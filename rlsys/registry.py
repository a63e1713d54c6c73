"""A registry is a dict with a decorator: names in a config resolve to functions or classes."""

from __future__ import annotations

import difflib
import inspect
from collections import UserDict
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

T = TypeVar("T")

LEAST_LIKE = 0.7
"""Similarity of a name to the one that is meant: gsop is gspo, and swanlab is not wandb."""


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint, "Did you mean 'x'?", of the known name nearest to `name`; empty if none is near."""
    by_letters = {key.lower(): key for key in known}
    near = difflib.get_close_matches(name.lower(), list(by_letters), n=1, cutoff=LEAST_LIKE)
    return f" Did you mean {by_letters[near[0]]!r}?" if near else ""


class Registry(UserDict[str, T]):
    """Named extensions of one kind.

    Example:
        losses: Registry[LossFunction] = Registry("loss")

        @losses.register("grpo")
        def grpo_loss(...): ...

        losses["grpo"]
    """

    def __init__(self, kind: str, *, unlisted: Collection[str] = ()):
        super().__init__()
        self.kind = kind
        self._unlisted = unlisted
        """Names that work and that errors do not list."""

    def __setitem__(self, name: str, value: T) -> None:
        if not callable(value):
            raise ValueError(f"{self.kind} {name!r} is {value!r:.80}, not a function or a class")
        before = self.data.get(name, value)
        # The same lines may come twice: from a file that is loaded again after an error in it.
        if before is not value and where_defined(before) != where_defined(value):
            raise ValueError(
                f"{self.kind} {name!r} is registered twice: by {where_defined(before)} "
                f"and by {where_defined(value)}. Rename one of them."
            )
        self.data[name] = value

    def __getitem__(self, name: str) -> T:
        if name not in self.data:
            known = self.known()
            raise ValueError(
                f"unknown {self.kind} {name!r}.{did_you_mean(name, known)} "
                f"Known: {', '.join(known) or 'none'}.{self.remedy(name)}"
            )
        return self.data[name]

    def known(self) -> list[str]:
        """The names that errors list."""
        return sorted(set(self.data).difference(self._unlisted))

    def remedy(self, name: str) -> str:
        """Further advice on an unknown `name`; subclasses may have some."""
        return ""

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of `registry[name] = value`."""

        def decorate(value: T) -> T:
            self[name] = value
            return value

        return decorate


def where_defined(value: object) -> str:
    """`file:line` of the definition, if it is written in Python."""
    try:
        defined = inspect.unwrap(value) if callable(value) else value
        lines = inspect.getsourcelines(cast(Any, defined))[1]
        return f"{inspect.getsourcefile(cast(Any, defined))}:{lines}"
    except (TypeError, OSError):  # not written in Python, or not in a file
        return repr(value)
