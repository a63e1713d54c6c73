"""A stored LoRA adapter that is merged, not trained: PEFT's options that change only its scaling.

`adapter_folder` has the narrower set that rlsys trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from rlsys.model.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from rlsys.model.folder import read_json
from rlsys.patterns import find

_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of adapters (lora_bias)",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "target_parameters": "adapters of parameters (target_parameters)",
}
"""Keys that mean something else than W + scaling B A, and what they mean."""
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
"""Values of init_lora_weights, besides true and false, that leave the base as it is."""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A LoRA adapter: W + scaling B A in place of each adapted weight W."""

    folder: Path
    base: str
    """Folder or hub id of the model that it was trained on."""
    rank: int
    alpha: float
    rslora: bool
    """Whether scaling is alpha / sqrt(rank), and not alpha / rank."""
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    """Other ranks and alphas for modules whose names end so."""

    def scaling(self, module: str) -> float:
        """Factor of B A in a module, by its name in the model."""
        rank = _matching(self.rank_pattern, module, self.rank)
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS_FILE


def read_adapter(folder: Path) -> StoredAdapter:
    """The adapter in a PEFT folder.

    Raises:
        ValueError: it is not LoRA, has an option that changes what LoRA computes, or lacks a file.
    """
    values = read_json(folder / CONFIG_FILE)
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {kind!r}: rlsys reads LORA")
    refused = [text for key, text in _REFUSED.items() if values.get(key)]
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        refused.append(f"init_lora_weights = {init!r}, which changes the base")
    if refused:
        raise ValueError(
            f"{folder} is an adapter with {' and '.join(refused)}, which rlsys does not compute: "
            "merge it with PEFT, and name the model that this gives"
        )
    missing = [key for key in ("r", "lora_alpha", "base_model_name_or_path") if not values.get(key)]
    if missing:
        raise ValueError(f"{folder / CONFIG_FILE} lacks {', '.join(missing)}: write it there")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} lacks {WEIGHTS_FILE}: PEFT's save_pretrained(FOLDER) writes it")
    return StoredAdapter(
        folder,
        str(values["base_model_name_or_path"]),
        rank=values["r"],
        alpha=values["lora_alpha"],
        rslora=bool(values.get("use_rslora")),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
    )


def _matching(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that the module's name ends with, as PEFT matches them."""
    for key, value in pattern.items():
        if find("fullmatch", rf"(.*\.)?({key})", module):
            return value
    return default
