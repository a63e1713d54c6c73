"""What the folder of a sequence classifier says, and which token its score stands at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsys.model.folder import read_json
from rlsys.model.shape import ModelShape
from rlsys.model.tokenizer_files import eos_token, token_ids


def pad_token_id(folder: Path) -> int | None:
    """The id of the token that pads rows: the pad token, or EOS where there is none.

    transformers' classifiers take the score at the last token with another id.
    """
    token = read_json(folder / "tokenizer_config.json").get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    return token_ids(folder).get(token or eos_token(folder) or "")


def classifier_config(
    folder: Path, shape: ModelShape, *, label_names: Sequence[str], problem_type: str | None
) -> dict[str, Any]:
    """Keys of config.json that make a language model's folder a classifier's.

    Args:
        folder: of the language model.
        shape: with a score head.
        label_names: of the classes; empty numbers them.
        problem_type: transformers' name of the loss; None: a reward model.
    """
    assert shape.num_labels is not None
    names = label_names or [f"LABEL_{number}" for number in range(shape.num_labels)]
    return {
        "architectures": [shape.family.classifier],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "pad_token_id": pad_token_id(folder),
        "problem_type": problem_type,
    }
