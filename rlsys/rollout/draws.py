"""Which prompts are begun, given up and begun again: plain data, without clocks or actors."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlsys.data.streams.base import PromptStream
from rlsys.types import Prompt


@dataclass(frozen=True, slots=True)
class Draw:
    """A prompt of the stream on its way into a batch."""

    position: int
    """Position in the stream, from 0; unique in the run."""
    attempt: int
    """How often it was begun and given up before."""
    prompt: Prompt
    version: int = 0
    """Version of the weights when it was begun: none of its tokens is older."""

    def seed_key(self, batch_size: int) -> tuple[int, ...]:
        """What its seed depends on: step and position in the batch of a run that neither runs
        ahead nor filters, and the attempt if it is not the first."""
        key = 1 + self.position // batch_size, self.position % batch_size
        return (*key, self.attempt) if self.attempt else key


class Draws:
    """The draws that are not in a batch yet: waiting, being sampled, being scored, or finished.

    A prompt that is taken from the stream stays here until `consume` removes it, because it was
    trained on or filtered out. So this state is what a resumed run has to sample again.

    Args:
        source: where new prompts come from.
        known: prompts that a state names by id; it holds all others whole.
    """

    def __init__(self, source: PromptStream, known: Sequence[Prompt] = ()):
        self._source = source
        self._known = {prompt.prompt_id: prompt for prompt in known}
        self._waiting: deque[Draw] = deque()
        self._begun: dict[int, Draw] = {}
        self._next_ticket = 0

    def __len__(self) -> int:
        """Number of draws that were begun."""
        return len(self._begun)

    def begin(self, n: int, *, version: int) -> dict[int, Draw]:
        """The next `n` draws by new tickets; draws that were given up come before new prompts."""
        missing = n - len(self._waiting)
        if missing > 0:
            first = self._source.num_taken
            new = enumerate(self._source.take(missing), start=first)
            self._waiting.extend(Draw(position, 0, prompt) for position, prompt in new)
        begun = {
            self.new_ticket(): replace(self._waiting.popleft(), version=version) for _ in range(n)
        }
        self._begun |= begun
        return begun

    def new_ticket(self) -> int:
        """A number for a group, unique in this process."""
        self._next_ticket += 1
        return self._next_ticket

    def __getitem__(self, ticket: int) -> Draw:
        """The draw that was begun under this ticket."""
        return self._begun[ticket]

    def consume(self, ticket: int) -> Draw:
        """Remove a draw that is trained on or filtered out."""
        return self._begun.pop(ticket)

    def give_up_all(self) -> list[int]:
        """Put back every draw that was begun, to begin it again later; returns their tickets."""
        given_up = sorted(self._begun.items(), key=lambda item: item[1].position)
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
        """Whether every draw, except the one `without`, can be in a batch before it is too stale.

        A draw that was begun with version v is due in the batch of step v + 1 + max_staleness. The
        batch of `step` has room for `room` more draws, every later one for `batch_size`. All are in
        time if for every step t, at most as many are due by t as there is room up to t.
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
        """The stream, and what was taken from it and not consumed, in JSON's types."""
        unused = [*self._begun.values(), *self._waiting]
        return {
            "prompts": self._source.state_dict(),
            "unused": [
                {
                    "place": draw.position,
                    "attempt": draw.attempt,
                    "prompt": self._named(draw.prompt),
                }
                for draw in sorted(unused, key=lambda draw: draw.position)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; its draws that were begun are begun again."""
        assert not self._begun, "draws have begun"
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

    The upper 62 bits of an 8-byte BLAKE2b over "seed:key:...": it depends on these numbers only,
    not on the engine, the process or the order of sampling.
    """
    text = ":".join(map(str, (seed, *key)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # room for + i within a signed 64-bit number
