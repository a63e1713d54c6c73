"""What the folder of a sequence classifier says, and which token its score stands at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.model.shape import ModelShape, read_model_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that pads rows: the pad token, or EOS where there is none.

    transformers' classifiers take the score at the last token with another id. The tokenizer's
    files alone do not say: some classes of tokenizers have a pad token of their own.
    """
    pad: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def stored_label_names(folder: Path, shape: ModelShape) -> list[str]:
    """Names of the classes of a folder that is a classifier already; empty without names."""
    assert shape.num_labels is not None
    values = read_model_config(folder)
    named: dict[str, str] = values.get("id2label") or {}
    names = [named[key] for key in map(str, range(shape.num_labels)) if key in named]
    is_classifier = values.get("architectures") == [shape.family.classifier]
    has_all = len(names) == shape.num_labels and names != _numbered(shape.num_labels)
    return names if is_classifier and has_all else []


def _numbered(num_labels: int) -> list[str]:
    """transformers' names of classes without names."""
    return [f"LABEL_{number}" for number in range(num_labels)]


def classifier_config(
    folder: Path,
    shape: ModelShape,
    *,
    pad_token_id: int | None,
    label_names: Sequence[str],
    problem_type: str | None,
) -> dict[str, Any]:
    """Keys of config.json that make a language model's folder a classifier's.

    Args:
        folder: of the language model, or of a classifier that is trained on.
        shape: with a score head.
        pad_token_id: what pads rows.
        label_names: of the classes; empty keeps those that a classifier has, or numbers them.
        problem_type: transformers' name of the loss; None: a reward model.
    """
    assert shape.num_labels is not None
    names = label_names or stored_label_names(folder, shape) or _numbered(shape.num_labels)
    return {
        "architectures": [shape.family.classifier],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "num_labels": shape.num_labels,  # which may be in `folder`, and there comes before id2label
        "pad_token_id": pad_token_id,
        "problem_type": problem_type,
    }
