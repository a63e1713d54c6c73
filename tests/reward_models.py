"""Tiny random reward models."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"


def save_reward_model(folder, *, seed=0, num_labels=1, template=TEMPLATE, max_length=512):
    """Write a model whose tokens are characters; returns tokenizer and model."""
    words = ["<pad>", "<end>", "<user>", "<assistant>", *map(chr, range(32, 127))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=max_length,
        num_labels=num_labels,
        pad_token_id=0,
    )
    model = Qwen3ForSequenceClassification(config)
    model.save_pretrained(folder)
    return tokenizer, model.eval()
