"""Models of well-known shapes with random weights, which take as long as the real ones."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)


@dataclass(frozen=True)
class Shape:
    """A dense model; Qwen2 has biases on q, k and v, Qwen3 norms on q and k instead."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    tied: bool = True
    head_dim: int | None = None
    """None is `hidden` / `heads`."""
    family: type = Qwen2Config


SHAPES = {
    "tiny": Shape(128, 2, 4, 2, 256, 512),
    "demo": Shape(128, 3, 4, 2, 384, 399, family=Qwen3Config),  # examples/countdown/demo.yaml
    "smollm2-135m": Shape(576, 30, 9, 3, 1536, 49152, family=LlamaConfig),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960, 151936),
    "qwen2.5-3b": Shape(2048, 36, 16, 2, 11008, 151936),
}


def save_random_model(folder: Path, shape: str, device: str, dtype: torch.dtype | None = None):
    """Write a Hugging Face folder of SHAPES[shape], with a tokenizer that knows <pad> and <eos>.

    `device`, "cpu" or "cuda", is where the weights are drawn. `dtype` None is what a run would
    take there: float32 on CPU, bfloat16 on a GPU.
    """
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config(SHAPES[shape]), dtype=dtype)
    model.save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)


def hf_config(shape: Shape):
    """The Hugging Face config of `shape`."""
    return shape.family(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim or shape.hidden // shape.heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape.tied,
        eos_token_id=1,
        bos_token_id=None,
    )
