"""Whether a model that was trained on answers would stop behind one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlsys.model.tokenizer_files import eos_token_ids
from rlsys.types import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOKED_AT = 100
"""Samples that are looked at."""
_LAST = 3
"""Last targets of a sample among which EOS is: white space may stand behind it."""


def turn_end_note(
    folder: Path, tokenizer: PreTrainedTokenizerBase, samples: Iterable[Sample]
) -> str | None:
    """What ends answers if it is not an EOS token of the model; None if it is one.

    Chat templates of ChatML with a base model are the usual case: its EOS ends documents, and turns
    end with `<|im_end|>`.
    """
    known = {token_id for _, token_id in eos_token_ids(folder)}
    if tokenizer.eos_token_id is not None:
        known.add(tokenizer.eos_token_id)
    end: int | None = None
    for sample in islice(samples, _LOOKED_AT):
        last = sample.token_ids[np.flatnonzero(sample.target_mask)[-_LAST:]].tolist()
        if known.intersection(last):
            return None
        words = [token_id for token_id in last if str(tokenizer.decode([token_id])).strip()]
        end = words[-1] if words else last[-1]
    if end is None:
        return None
    token = tokenizer.convert_ids_to_tokens(end)
    return (
        f"what is trained on ends with {token!r} (id {end}), which is not an EOS token of "
        f"{folder}: vLLM and transformers would go on behind it. Add the id to eos_token_id in the "
        "generation_config.json of the model's folder, before or after training"
    )
