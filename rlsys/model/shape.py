"""What config.json says about a model, read without torch or transformers.

Enough to count parameters and to tell before a run whether its parallel sizes divide.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.model.keys import ARCHITECTURES, key_problems

SUPPORTED_MODEL_TYPES = tuple(ARCHITECTURES)
_DEFAULTS: dict[str, dict[str, int]] = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
}
"""What transformers and vLLM take for a size that config.json leaves out."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder, dense or with experts in every layer."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    """Whether the output head is the embedding."""
    max_position_embeddings: int
    num_experts: int = 0
    """Of each layer; 0 in dense models."""
    num_experts_per_tok: int = 0
    """Experts that a token goes through in each layer."""
    moe_intermediate_size: int = 0
    """Intermediate size of one expert; a model with experts does not use `intermediate_size`."""
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts are normalised to a sum of 1."""

    @property
    def is_moe(self) -> bool:
        """Whether the layers have experts."""
        return self.num_experts > 0

    @property
    def has_qkv_bias(self) -> bool:
        """Whether q, k and v have a bias: always in Qwen2, which does not say so in its config."""
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        """Whether q and k are normalised by head."""
        return self.model_type in ("qwen3", "qwen3_moe")

    @property
    def embedding_params(self) -> int:
        """Parameters of the embedding, and of an untied head."""
        return self.vocab_size * self.hidden_size

    @property
    def expert_params(self) -> int:
        """Parameters of all experts of one layer."""
        return self.num_experts * 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def layer_params(self) -> int:
        """Parameters of one layer, all its experts included."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * q + 2 * self.hidden_size * kv
        if self.has_qkv_bias:
            attention += q + 2 * kv
        if self.has_qk_norm:
            attention += 2 * self.head_dim
        if self.is_moe:
            mlp = self.expert_params + self.num_experts * self.hidden_size  # the router
        else:
            mlp = 3 * self.hidden_size * self.intermediate_size
        return attention + mlp + 2 * self.hidden_size

    @property
    def num_params(self) -> int:
        """All parameters; the final norm and a tied embedding count once."""
        embeddings = self.embedding_params * (1 if self.tied else 2)
        return embeddings + self.num_layers * self.layer_params + self.hidden_size

    def kv_elements_per_token(self, tensor_parallel_size: int) -> int:
        """Numbers that each rank's KV cache holds for one token; a rank has at least one head."""
        heads = max(1, self.num_kv_heads // tensor_parallel_size)
        return 2 * self.num_layers * heads * self.head_dim


def read_model_config(folder: Path) -> dict[str, Any]:
    """What `folder/config.json` says.

    Raises:
        ValueError: no config.json, or not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a Hugging Face model folder")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    return values


def read_model_shape(folder: Path) -> ModelShape:
    """The shape in `folder/config.json`.

    Raises:
        ValueError: no config.json, not JSON, or not a model that rlsys trains.
    """
    file = folder / "config.json"
    values = read_model_config(folder)
    model_type = values.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"{file}: model_type {model_type!r} is not supported; use a model of type "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    problems = list(key_problems(values))
    if problems:
        raise ValueError("\n".join(f"{file}: {problem}" for problem in problems))
    values = _DEFAULTS.get(model_type, {}) | values
    try:
        num_heads = values["num_attention_heads"]
        return ModelShape(
            model_type=model_type,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads") or num_heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // num_heads,
            tied=values.get("tie_word_embeddings", False),
            max_position_embeddings=values["max_position_embeddings"],
            **(_expert_fields(file, values) if model_type == "qwen3_moe" else {}),
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from None


def _expert_fields(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes num_local_experts, transformers 4 and the models on the hub num_experts.
    num_experts = values.get("num_local_experts") or values["num_experts"]
    per_token, normalised = values["num_experts_per_tok"], values.get("norm_topk_prob", False)
    if not 0 < per_token <= num_experts:
        raise ValueError(
            f"{file}: num_experts_per_tok = {per_token} of {num_experts} experts is not possible"
        )
    if per_token == 1 and normalised:
        raise ValueError(
            f"{file}: norm_topk_prob with num_experts_per_tok = 1 makes every weight 1, so that "
            "the router would not be trained: it is not supported"
        )
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": values["moe_intermediate_size"],
        "norm_topk_prob": normalised,
    }
