"""A small valid config, as the YAML file that a user would write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rlsys.config import Config
from rlsys.config.yaml_text import dump_yaml
from rlsys.model.families.base import weight_table
from rlsys.model.shape import read_model_shape

MODEL_SIZES = {
    "model_type": "qwen3",
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}

EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
"""What makes `MODEL_SIZES` a mixture of experts."""


def values(**sections: dict[str, Any]) -> dict[str, Any]:
    """A minimal config, with some sections' fields replaced or added."""
    base: dict[str, Any] = {
        "output_dir": "run",
        "max_steps": 10,
        "data": {"dataset": ["train.jsonl"], "max_prompt_length": 64},
        "model": {"path": "model"},
        "rollout": {
            "num_generations": 4,
            "generation_batch_size": 16,
            "max_completion_length": 64,
        },
        "reward": {"reward_funcs": ["countdown", "format"]},
    }
    for name, fields in sections.items():
        base[name] = {**base.get(name, {}), **fields} if isinstance(fields, dict) else fields
    return base


def config_of_paths(**sections: Any) -> Config:
    """A config whose paths are relative, with whole sections replaced or added."""
    return Config.model_validate(
        {
            "output_dir": "runs/out",
            "max_steps": 1,
            "data": {"dataset": ["data/train.jsonl", "org/data"]},
            "model": {"path": "runs/model"},
            "rollout": {"generation_batch_size": 4, "num_generations": 2},
            "reward": {"reward_funcs": ["format"]},
            **sections,
        }
    )


def write_config(folder: Path, **sections: Any) -> Path:
    """`values(**sections)` as a file."""
    path = folder / "run.yaml"
    path.write_text(dump_yaml(values(**sections)))
    return path


def write_sft_run(folder: Path, *, model: dict[str, Any] | None = None, **sections: Any) -> Path:
    """`write_run` for supervised training; `model` has sizes of the model."""
    write_model(folder / "model", **(model or {}))
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    (folder / "train.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    values = {
        "output_dir": str(folder / "run"),
        "max_steps": 10,
        "data": {"dataset": [str(folder / "train.jsonl")], "max_length": 64},
        "model": {"path": str(folder / "model")},
        "policy": {"global_batch_size": 4},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields} if isinstance(fields, dict) else fields
    path = folder / "sft.yaml"
    path.write_text(dump_yaml({key: value for key, value in values.items() if value is not None}))
    return path


def write_preference_run(folder: Path, **sections: Any) -> Path:
    """`write_run` for preference training."""
    write_model(folder / "model")
    row = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
    (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 20)
    values = {
        "output_dir": str(folder / "run"),
        "max_steps": 10,
        "data": {"dataset": [str(folder / "train.jsonl")], "max_length": 64},
        "model": {"path": str(folder / "model")},
        "preference": {},
        "policy": {"global_batch_size": 4},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields} if isinstance(fields, dict) else fields
    path = folder / "preference.yaml"
    path.write_text(dump_yaml({key: value for key, value in values.items() if value is not None}))
    return path


def write_distill_run(folder: Path, **sections: Any) -> Path:
    """`write_sft_run` for distillation, with a teacher that is larger."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "teacher", hidden_size=128, max_position_embeddings=512)
    sections = {"model": {"max_position_embeddings": 512}} | sections
    base = {"teacher": {"path": str(folder / "teacher")}, "distill": {"beta": 0.5}}
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return write_sft_run(folder, **merged)


def write_model(folder: Path, **sizes: Any) -> Path:
    """A model folder as preflight reads it: weights are names, shapes and zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL_SIZES | sizes))
    write_weights(folder / "model.safetensors", hf_shapes(folder))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def hf_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what the model of config.json consists of; none if rlsys refuses it."""
    try:
        table = weight_table(read_model_shape(folder))
    except ValueError:
        return {}
    return {
        name: shape
        for row in table
        for name, shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }


def write_weights(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> None:
    """A safetensors file of zeros, which take no place on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as content:
        content.write(len(text).to_bytes(8, "little") + text)
        content.truncate(content.tell() + end)


def write_run(folder: Path, **sections: Any) -> Path:
    """A config whose model and data are there too, with paths from the root."""
    write_model(folder / "model")
    row = {"messages": [{"role": "user", "content": "1 + 1?"}], "nums": [1, 1], "target": 2}
    (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 20)
    places = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), **sections.pop("model", {})},
        "data": {"dataset": [str(folder / "train.jsonl")], **sections.pop("data", {})},
    }
    return write_config(folder, **(places | sections))


def write_reward_model_run(folder: Path, **sections: Any) -> Path:
    """`write_run` for a reward model, with 20 pairs."""
    write_model(folder / "model")
    pair = {
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected": [{"role": "assistant", "content": "3"}],
    }
    (folder / "train.jsonl").write_text((json.dumps(pair) + "\n") * 20)
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": 10,
        "data": {"dataset": [str(folder / "train.jsonl")], "max_length": 64},
        "model": {"path": str(folder / "model")},
        "reward_model": {},
        "policy": {"global_batch_size": 4},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields} if isinstance(fields, dict) else fields
    path = folder / "reward_model.yaml"
    path.write_text(dump_yaml(values))
    return path
