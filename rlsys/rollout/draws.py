"""Which prompts are begun, given up or begun again: the bookkeeping of a rollout that runs ahead.

Plain data without clocks, actors or tensors, so that every rule can be tested by itself.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlsys.data.streams.base import PromptStream
from rlsys.types import Prompt


@dataclass(frozen=True, slots=True)
class Draw:
    """A prompt of the stream on its way into a batch."""

    place: int
    """In the stream, from 0; no other draw of the run has it."""
    attempt: int
    """How often it was begun and given up before."""
    prompt: Prompt
    version: int = 0
    """Weights when it was begun: none of its tokens is older."""


class DrawPool:
    """The draws that are in no batch yet: being sampled, being scored, or finished.

    Every prompt that is taken from the stream stays here until `settle` says that it was trained
    on or filtered out. So the state of the pool is what a resumed run has to sample again.

    Args:
        source: where new prompts come from.
        known: prompts that a state names; all others it holds whole.
    """

    def __init__(self, source: PromptStream, known: Sequence[Prompt] = ()):
        self._source = source
        self._known = {prompt.prompt_id: prompt for prompt in known}
        self._waiting: deque[Draw] = deque()
        self._begun: dict[int, Draw] = {}
        self._next_ticket = 0

    def __len__(self) -> int:
        """Draws that were begun."""
        return len(self._begun)

    def begin(self, n: int, *, version: int) -> dict[int, Draw]:
        """The next `n` draws, by new numbers; those that were given up come before new prompts."""
        missing = n - len(self._waiting)
        if missing > 0:
            place = self._source.num_taken
            new = enumerate(self._source.take(missing), start=place)
            self._waiting.extend(Draw(place, 0, prompt) for place, prompt in new)
        begun = {
            self.new_ticket(): replace(self._waiting.popleft(), version=version) for _ in range(n)
        }
        self._begun |= begun
        return begun

    def new_ticket(self) -> int:
        """A number that no group of this process had before."""
        self._next_ticket += 1
        return self._next_ticket

    def __getitem__(self, ticket: int) -> Draw:
        """The draw that was begun under this number."""
        return self._begun[ticket]

    def settle(self, ticket: int) -> Draw:
        """The draw has had its use: it was trained on, or filtered out."""
        return self._begun.pop(ticket)

    def give_up_all(self) -> list[int]:
        """Have every draw that was begun begun again later; returns their numbers."""
        given_up = sorted(self._begun.items(), key=lambda item: item[1].place)
        self._begun.clear()
        again = [replace(draw, attempt=draw.attempt + 1) for _, draw in given_up]
        self._waiting.extendleft(reversed(again))
        return [ticket for ticket, _ in given_up]

    def is_in_time(
        self,
        *,
        step: int,
        room: int,
        batch_size: int,
        max_staleness: int,
        without: int | None = None,
    ) -> bool:
        """Whether no draw, other than the one `without`, has to become too stale.

        A draw that was begun with version v is to be in the batch of step v + 1 + max_staleness
        at the latest. The batch of `step` has `room` for so many draws, every later one has room
        for `batch_size`. All can be in time if for every step t, no more of them are due by t
        than there is room up to t.
        """
        due = sorted(
            draw.version + 1 + max_staleness
            for other, draw in self._begun.items()
            if other != without
        )
        return all(
            count <= room + batch_size * (last_step - step)
            for count, last_step in enumerate(due, start=1)
        )

    def state_dict(self) -> dict[str, Any]:
        """The stream and what was taken from it without having had its use, as JSON has it."""
        unused = [*self._begun.values(), *self._waiting]
        return {
            "prompts": self._source.state_dict(),
            "unused": [
                {"place": draw.place, "attempt": draw.attempt, "prompt": self._named(draw.prompt)}
                for draw in sorted(unused, key=lambda draw: draw.place)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the pool with this state was; what it had begun is begun again."""
        assert not self._begun, "a pool that has begun"
        self._source.load_state_dict(state["prompts"])
        self._waiting = deque(
            Draw(unused["place"], unused["attempt"], self._prompt(unused["prompt"]))
            for unused in state["unused"]
        )

    def _named(self, prompt: Prompt) -> str | dict[str, Any]:
        return prompt.prompt_id if prompt.prompt_id in self._known else asdict(prompt)

    def _prompt(self, named: str | dict[str, Any]) -> Prompt:
        if not isinstance(named, str):
            return Prompt(**named)
        if named not in self._known:
            raise ValueError(
                f"the checkpoint has the prompt {named!r} still to be trained on, which the data "
                "does not have: it is not what the run started with. Resume with the data and the "
                "data section of that run, or start a new run from its weights: set model.path to "
                "its model, and another output_dir."
            )
        return self._known[named]


def sampling_seed(seed: int, *key: int) -> int:
    """The seed of one prompt's completions; completion i is sampled with seed + i.

    The upper 62 bits of an 8-byte BLAKE2b over "seed:key:...", so it depends on nothing but these
    numbers: not on the engine, the process or the order of sampling.
    """
    text = ":".join(map(str, (seed, *key)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # room for + i within a signed 64-bit number


def lowest_free(taken: Iterable[int]) -> int:
    """The least number from 0 on that is not among `taken`."""
    used = set(taken)
    return next(number for number in range(len(used) + 1) if number not in used)
