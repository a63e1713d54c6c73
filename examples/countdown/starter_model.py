"""A language model small enough to learn Countdown on a laptop: tokenizer, config, random weights.

Qwen3's architecture with 0.64 million parameters. The tokenizer knows what Countdown needs: digits
one by one, so that numbers are spelled as they are computed with; the four tags as whole tokens;
and the words of the prompt, merged by byte-level BPE.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from problems import generate_problems
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_TOKENS = 256
VOCAB_LIMIT = 512

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on Countdown prompts, with Qwen's chat markers and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT - len(TAGS) - 3,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    markers = (END_OF_TEXT, TURN_START, TURN_END)
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    # Not special: completions are decoded without special tokens, and rewards read the tags.
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
    )


def _corpus() -> list[str]:
    """Prompts cut at the tags, so that no merge spans one."""
    texts = ["user\n", "assistant\n", "system\n"]
    for row in generate_problems(2000, seed=7):
        texts += re.split("|".join(TAGS), row["messages"][0]["content"])
    return [text for text in texts if text]


def write_starter_model(folder: Path, *, seed: int) -> None:
    """Write the untrained model and its tokenizer as a Hugging Face folder."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,  # divisible by any small tensor parallelism
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
