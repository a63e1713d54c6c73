"""The sizes of a model in its config.json, read without torch or transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.model.families import FAMILIES
from rlsys.model.families.base import LayerShape, ModelFamily
from rlsys.model.families.bridged import bridged_family
from rlsys.model.families.experts import NO_EXPERTS, Experts
from rlsys.model.families.latent import LatentAttention
from rlsys.model.families.linear import LinearAttention
from rlsys.model.folder import read_json
from rlsys.model.keys import key_problems
from rlsys.model.other_kinds import refuse_other_kind, unknown_type_problem
from rlsys.model.rope import num_positions


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder, and what its layers are."""

    family: ModelFamily
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
    layers: tuple[LayerShape, ...]
    has_qkv_bias: bool = False
    """Whether q, k and v have a bias."""
    has_qk_norm: bool = False
    """Whether q and k are normalised by head."""
    latent: LatentAttention | None = None
    """What keys and values come from in latent attention; None: each KV head has its own."""
    linear: LinearAttention | None = None
    """Sizes of the layers of linear attention; None if there are only others."""
    num_mtp_layers: int = 0
    """Layers behind the last one that predict further tokens: neither trained nor sampled with."""
    softmax_scale: float | None = None
    """What attention multiplies its scores by; None: 1 / sqrt(head_dim)."""
    experts: Experts = NO_EXPERTS
    """Of the layers with experts."""
    num_labels: int | None = None
    """Outputs of a score head in place of the output head; None: a language model."""

    @property
    def model_type(self) -> str:
        """The model_type of config.json."""
        return self.family.model_type

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return self.experts.number > 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts, from 0."""
        return tuple(number for number, layer in enumerate(self.layers) if layer.has_experts)

    @property
    def has_dense_mlp(self) -> bool:
        """Whether any layer has an MLP without experts."""
        return not all(layer.has_experts for layer in self.layers)

    @property
    def has_windows(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(layer.window for layer in self.layers)

    @property
    def embedding_params(self) -> int:
        """Parameters of the embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All parameters; the final norm and a tied embedding count once."""
        ends = self.embedding_params + (0 if self.tied else self.head_params)
        return ends + sum(self.layer_params(self.layers)) + self.hidden_size

    @property
    def head_params(self) -> int:
        """Parameters of an output head of its own, or of the score head in its place."""
        if self.num_labels is None:
            return self.embedding_params
        return self.num_labels * self.hidden_size

    def is_in_mtp_layer(self, name: str) -> bool:
        """Whether a Hugging Face tensor is of a layer that predicts further tokens."""
        if self.family.mtp_prefix is not None and name.startswith(self.family.mtp_prefix):
            return True
        layers = range(self.num_layers, self.num_layers + self.num_mtp_layers)
        return any(name.startswith(f"model.layers.{layer}.") for layer in layers)

    def layer_params(self, layers: Sequence[LayerShape]) -> tuple[int, int]:
        """Parameters of `layers`, without experts and of experts."""
        dense = experts = 0
        for layer, count in Counter(layers).items():
            rows = self.family.layer(self, layer)
            dense += count * sum(row.num_params for row in rows if not row.experts)
            experts += count * sum(row.num_params for row in rows if row.experts)
        return dense, experts

    def kv_elements_per_token(self, tensor_parallel_size: int) -> int:
        """Numbers that each rank's KV cache holds for one token; a rank has at least one head.

        In latent attention all ranks hold the same.
        """
        if self.latent is not None:
            return self.num_layers * self.latent.cached
        heads = max(1, self.num_kv_heads // tensor_parallel_size)
        return 2 * self.num_kv_layers * heads * self.head_dim

    @property
    def num_kv_layers(self) -> int:
        """Layers that keep keys and values; linear layers have a state of constant size instead."""
        return sum(not layer.is_linear for layer in self.layers)

    def state_elements(self, tensor_parallel_size: int) -> int:
        """Numbers that each rank keeps of a sequence for each linear layer, however long it is."""
        return 0 if self.linear is None else self.linear.state_elements // tensor_parallel_size


def read_model_config(folder: Path) -> dict[str, Any]:
    """What `folder/config.json` says.

    Raises:
        ValueError: config.json is missing, or is not a JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        refuse_other_kind(folder)
        raise ValueError(f"{folder} holds no config.json, so it is not a Hugging Face model folder")
    return read_json(file)


def read_model_shape(
    folder: Path, *, may_bridge: bool = False, num_labels: int | None = None
) -> ModelShape:
    """The shape in `folder/config.json`.

    Args:
        folder: the model folder.
        may_bridge: mcore-bridge may have the weights, see Config.may_bridge.
        num_labels: outputs of the score head that the run gives the model; None: it stays a
            language model.

    Raises:
        ValueError: config.json is missing, cannot be read, or is of a model that rlsys does not
            train.
    """
    file = folder / "config.json"
    values = read_model_config(folder)
    model_type = values.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None and ("text_config" in values or not may_bridge):
        raise ValueError(f"{file}: {unknown_type_problem(values, FAMILIES)}")
    problems = (
        [] if family is None else list(key_problems(values, is_classifier=num_labels is not None))
    )
    if problems:
        raise ValueError("\n".join(f"{file}: {problem}" for problem in problems))
    try:
        family = family or bridged_family(values)
        values = {**family.defaults, **values}
        num_heads = values["num_attention_heads"]
        return ModelShape(
            family=family,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=values.get("num_key_value_heads") or num_heads,
            tied=num_labels is None and values.get("tie_word_embeddings", False),
            max_position_embeddings=num_positions(values),
            layers=family.layers(values),
            num_labels=num_labels,
            **{
                "head_dim": values.get("head_dim") or values["hidden_size"] // num_heads,
                **family.constants,
                **family.own_sizes(values),
            },
        )
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
