"""Folders that hold something else than weights that can be trained, and what to do with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rlsys.model.adapter_folder import CONFIG_FILE, is_adapter_folder
from rlsys.model.folder import read_json
from rlsys.model.weight_files import TRACKER

_QUANTIZED_ENDS = (
    # GPTQ and AWQ; compressed-tensors; FP8 of DeepSeek, of others; MXFP4; bitsandbytes.
    (".qweight", "gptq or awq"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".weight_scale", "fp8"),
    ("_blocks", "mxfp4"),
    (".absmax", "bitsandbytes"),
)
"""Ends of the names of tensors that only quantized weights have -> the method."""
_CONVERTIBLE = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}
"""Methods that transformers converts back -> the class that says so."""
_WHY_NOT = {
    "gemma2": "it caps attention scores (attn_logit_softcapping), which Transformer Engine cannot",
}
"""model_type of text models -> what keeps rlsys from them."""


def refuse_other_kind(folder: Path) -> None:
    """Refuse a folder of an adapter, or of megatron-core's files only.

    Raises:
        ValueError: says what it is, and what to do.
    """
    if is_adapter_folder(folder):
        base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
        raise ValueError(
            f"{folder} is a LoRA adapter{f' of {base}' if base else ''}, not a model: merge it "
            f"with `rlsys export {folder} --merge --to hf NEW`, and name NEW. To go on training "
            "it, name its base here, and the adapter as policy.lora.path"
        )
    if (folder / TRACKER).is_file() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds megatron-core's torch_dist files and no safetensors: convert it with "
            f"`rlsys export {folder} --to hf NEW`, and name NEW"
        )


def unknown_type_problem(values: Mapping[str, Any], known: Collection[str]) -> str:
    """What a config.json with another model_type than the `known` ones is refused with."""
    model_type, text = values.get("model_type"), values.get("text_config")
    if not isinstance(text, Mapping):
        why = _WHY_NOT.get(str(model_type))
        reason = f": {why}" if why is not None else ""
        return (
            f"model_type {model_type!r} is not supported{reason}; use a model of type "
            f"{', '.join(known)}. On GPUs mcore-bridge has more, see model.bridge"
        )
    inner = str(text.get("model_type"))
    return (
        f"model_type {model_type!r} is a model of text and of images or sounds, and rlsys trains "
        f"text models. The model_type of its text_config is {inner!r}, which "
        + (
            "rlsys trains: save the text model alone, as docs/models.md shows, and name that folder"
            if inner in known
            else f"is not supported either; use a model of type {', '.join(known)}"
        )
    )


def quantized_as(names: Iterable[str]) -> str | None:
    """The method by which tensors of these names are quantized; None for ordinary weights."""
    for name in names:
        for end, method in _QUANTIZED_ENDS:
            if name.endswith(end):
                return method
    return None


def quantization_method(value: Any) -> str:
    """The method in a quantization_config."""
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    return str(method or "quantized numbers")


def quantized_problem(method: str) -> str:
    """What quantized weights are refused with, and how to get others."""
    config = _CONVERTIBLE.get(method)
    if config is not None:
        remedy = (
            "write the model in bfloat16 with transformers (`AutoModelForCausalLM.from_pretrained("
            f"FOLDER, dtype='bfloat16', quantization_config={config}(dequantize=True))"
            ".save_pretrained(NEW)`), or use the bfloat16 model that was quantized"
        )
    else:
        remedy = (
            "use the bfloat16 model that was quantized (its page names it; numbers of 4 or 8 bits "
            "do not give it back)"
        )
    return (
        f"its weights are stored as {method}, and rlsys trains weights in bfloat16 or float32: "
        f"{remedy}"
    )
