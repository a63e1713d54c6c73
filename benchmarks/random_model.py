"""Models of well-known shapes with random weights, which take as long as the real models."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


@dataclass(frozen=True)
class Shape:
    """A model; Qwen2 has biases on q, k and v, Qwen3 norms on q and k instead."""

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
    experts: int = 0
    """Experts of each layer; 0 is a dense model. With experts `ffn` is the size of one."""
    experts_per_token: int = 0


SHAPES = {
    "tiny": Shape(128, 2, 4, 2, 256, 512),
    "demo": Shape(128, 3, 4, 2, 384, 399, family=Qwen3Config),  # examples/countdown/demo.yaml
    "smollm2-135m": Shape(576, 30, 9, 3, 1536, 49152, family=LlamaConfig),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960, 151936),
    "qwen2.5-3b": Shape(2048, 36, 16, 2, 11008, 151936),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 18944, 152064, tied=False),
    "tiny-moe": Shape(128, 2, 4, 2, 64, 512, False, 32, Qwen3MoeConfig, 8, 2),
    # The first 8 of the 48 layers of Qwen3-30B-A3B, and as many dense ones of equal active size.
    "qwen3-30b-a3b-8-layers": Shape(
        2048, 8, 32, 4, 768, 151936, False, 128, Qwen3MoeConfig, experts=128, experts_per_token=8
    ),
    "qwen3-a3b-dense-8-layers": Shape(2048, 8, 32, 4, 6144, 151936, False, 128, Qwen3Config),
}
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
LOGIT_STD = 6.0
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- message['role'] + ' ' + message['content'] }}"
    "{{- eos_token if message['role'] == 'assistant' }}{{- '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant ' }}{%- endif %}"
)


def save_random_model(
    folder: Path,
    shape: str,
    device: str,
    dtype: torch.dtype | None = None,
    *,
    endless: bool = False,
):
    """Write a Hugging Face folder of SHAPES[shape], with a tokenizer of as many words.

    `device`, "cpu" or "cuda", is where the weights are drawn. `dtype` None is what a run would
    take there: float32 on CPU, bfloat16 on a GPU. With `endless` no completion ends before
    max_completion_length, so that what is compared samples the same number of tokens, without
    a setting that runs do not have: the logit of EOS is 0, and the others are far apart.
    """
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    config = hf_config(SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if endless:
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            head.normal_(std=LOGIT_STD / config.hidden_size**0.5)  # of hidden states of RMS 1
            head[config.eos_token_id] = 0.0
    model.save_pretrained(folder)
    build_tokenizer(config.vocab_size).save_pretrained(folder)


def hf_config(shape: Shape):
    """The Hugging Face config of `shape`."""
    experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.ffn,
        "norm_topk_prob": True,
    }
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
        **(experts if shape.experts else {}),
    )


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token for every digit, sign and tag of a Countdown prompt, and `vocabulary` in all."""
    known = [PAD, EOS, UNKNOWN, *"0123456789+-*/=<>()[],."]
    words = [*known, *(f"word{number}" for number in range(vocabulary - len(known)))]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
    )
