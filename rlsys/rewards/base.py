"""What a reward function is, and the registry that gives it a name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.config import REWARD_MODEL_PREFIX
from rlsys.plugins import load as plugins
from rlsys.registry import Registry
from rlsys.rewards.styles import TRL_PREFIX, bare_name, in_style

Rewards = Sequence[float | None]
"""One number per completion; None: the function does not apply to this one."""
RewardFunction = Callable[..., Rewards | Awaitable[Rewards]]


class ORM:
    """Outcome reward function: scores finished completions.

    Derive from it, implement `__call__` and register the class. It is instantiated once in every
    reward process, with the keyword arguments that `reward.reward_params` has for its name.

    A class that compares with a right answer may have two more methods, which get the columns of a
    row: `gold(row)` returns the answer that it reads, or None if the row has no usable one;
    `example(row)` returns what a completion would answer, where that differs from `gold(row)`.

    Example:
        @register_reward("short")
        class Short(ORM):
            max_reward = 1.0

            def __init__(self, max_characters: int = 100):
                self.max_characters = max_characters

            def __call__(self, completions, **columns):
                return [float(len(text) <= self.max_characters) for text in completions]
    """

    max_reward: float | None = None
    """What a completion that is right in every way earns; None: not known. If it is known, a run
    and `rlsys data preview` check that the rows let a completion earn it."""
    reads_think_tags: bool = False
    """Whether completions start with the `<think>` that their prompt ends with: for functions that
    look for the tag, or for what follows `</think>`."""

    def __init__(self, args: Any = None, **kwargs: Any):
        # The signature that ms-swift's rewards call through super().__init__(args, **kwargs).
        self.args = args

    # *args so that type checkers let subclasses name the columns that they need.
    def __call__(
        self, completions: list[str], *args: Any, **columns: Any
    ) -> Rewards | Awaitable[Rewards]:
        """One finite number per completion, in order, or None where it does not apply.

        Args:
            completions: [G] texts sampled from one prompt, special tokens removed.
            columns: each dataset column by its name as a list of G values, and `OWN_COLUMNS`.
        """
        raise NotImplementedError

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Refuse a row of the dataset that this function could not score.

        Called in the driver for every row, before a run starts. A `staticmethod` needs no
        instance there. A function may have an attribute `check_row`.

        Args:
            row: its columns besides the prompt, None for those that only other rows have.

        Raises:
            ValueError: the row is wrong; the message says how, and need not say where.
        """


class AsyncORM(ORM):
    """An outcome reward function that waits, say for a server: `async def __call__`.

    The calls for many groups run at the same time in one event loop. A class derived from `ORM`
    may be async too; this name exists because ms-swift has it.
    """


def check_choice(reward: str, setting: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless a setting has one of the values that it may have."""
    if value not in choices:
        raise ValueError(
            f"{reward}: {setting} must be one of {', '.join(map(str, choices))}, not {value!r}"
        )


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where the run is, for rewards that change as training goes on."""

    global_step: int
    """Updates of the policy when the completions were sampled: 0 in the first step, as in TRL."""
    max_steps: int

    def __getattr__(self, name: str) -> Any:
        """Name the attributes that exist, as TRL's state has more."""
        raise AttributeError(f"trainer_state has global_step and max_steps, not {name}")


def trl_style(function: RewardFunction) -> RewardFunction:
    """Mark a function as written for TRL, see `TrlStyle`; a decorator.

    `trl/` before a reference does the same without touching the file: `trl/path/to/file.py:name`.

    Example:
        @register_reward("brief")
        @trl_style
        def brief(completions, **kwargs):
            return [float(len(messages[0]["content"]) < 100) for messages in completions]

    Raises:
        ValueError: it is a class, whose instances TRL would not make.
    """
    return in_style(TRL_PREFIX, function)


OWN_FUNCTION = (
    " For one of your own, name its file in reward.external_plugins (rewards try: --plugin FILE)."
)
"""Advice on a name that no plugin explains."""


class RewardRegistry(Registry[type[ORM] | RewardFunction]):
    """Reward functions by name; also imports functions that nobody registered.

    A name is looked up as: an entry point `rlsys.rewards` of an installed package;
    `reward_model:PATH`, one of several reward models; a registered name; a reference,
    `path/to/file.py:name`, `package.module:name` or `package.module.name`. `trl/` or `verl/` may
    stand before the last two. An entry point and a registration of one name are an error.
    """

    def __getitem__(self, name: str) -> type[ORM] | RewardFunction:
        """The class or function.

        Raises:
            ValueError: an unknown or ambiguous name, or the function cannot be imported.
        """
        offered = plugins.load_entry_point(name)
        if name.startswith(REWARD_MODEL_PREFIX):
            name = REWARD_MODEL_PREFIX[:-1]  # its path is a setting, see RewardConfig.params
        if offered is not None:
            self[name] = offered  # an error when somebody else has the name
        elif name not in self.data and (bare := bare_name(name)) in self.data:
            self[name] = in_style(name, self.data[bare])
        elif name not in self.data and (reference := _reference(name)) is not None:
            self[name] = in_style(name, plugins.load_reference(reference))
        return super().__getitem__(name)

    def remedy(self, name: str) -> str:
        """How to name the function, where `name` is a plugin or an unregistered function."""
        if f"{TRL_PREFIX}{name}" in self.data:
            return f" TRL's function of this name is {TRL_PREFIX}{name}."
        if name.endswith(".py"):
            return f" That is a file: name a function in it, as {name}:FUNCTION."
        if swift := plugins.imports_of_swift():
            return f" {swift[0]}"
        found = plugins.find_unregistered(name)
        if found is None:
            return OWN_FUNCTION
        path, reference = found
        return (
            f" {path} was loaded, but registered no reward {name!r}: put "
            f"@register_reward({name!r}) above the function in it, or name that as "
            f"{reference} (path:function)."
        )


def _reference(name: str) -> str | None:
    """`place:name` of a name that is not registered; None if it is not a reference."""
    name = bare_name(name)
    if ":" in name:
        return name
    module, dot, function = name.rpartition(".")
    is_dotted = dot and not name.endswith(".py") and name.replace(".", "_").isidentifier()
    return f"{module}:{function}" if is_dotted else None


orms: RewardRegistry = RewardRegistry("reward function")
"""Name -> ORM class, or function `f(completions, **columns)`; either may be async."""

register_reward = orms.register
"""Decorator form of `orms[name] = value`."""
