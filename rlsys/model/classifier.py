"""What the folder of a sequence classifier says, and which token its score stands at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlsys.model.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that pads rows: the pad token, or EOS where there is none.

    transformers' classifiers take the score at the last token with another id. The tokenizer's
    files alone do not say: some classes of tokenizers have a pad token of their own.
    """
    pad: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def classifier_config(
    shape: ModelShape,
    *,
    pad_token_id: int | None,
    label_names: Sequence[str],
    problem_type: str | None,
) -> dict[str, Any]:
    """Keys of config.json that make a language model's folder a classifier's.

    Args:
        shape: with a score head.
        pad_token_id: what pads rows.
        label_names: of the classes; empty numbers them.
        problem_type: transformers' name of the loss; None: a reward model.
    """
    assert shape.num_labels is not None
    names = label_names or [f"LABEL_{number}" for number in range(shape.num_labels)]
    return {
        "architectures": [shape.family.classifier],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "pad_token_id": pad_token_id,
        "problem_type": problem_type,
    }
