"""Qwen3 models of a few kilobytes, with a byte-level tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 512
STOP_TOKEN_IDS = [1, *range(400, 430)]
"""So many that a random model ends one in two completions of a few tens of tokens."""
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that models differ in what they find likely
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def save_tiny_qwen3(folder, *, tied, seed):
    """Write a random fp32 model of 2 layers, hidden 64, vocabulary 512."""
    torch.manual_seed(seed)
    save_model(_model(tied=tied), folder)


@torch.no_grad()
def save_tiny_qwen3_moe(folder, *, seed, norm_topk_prob=True, **sizes):
    """Write a random untied fp32 model of 2 layers, each token through 2 of their 8 experts."""
    save_model(_experts(seed, norm_topk_prob=norm_topk_prob, **sizes), folder)


@torch.no_grad()
def save_markov_qwen3(folder, successors):
    """Write a tied model that follows each token of `successors` by one token, with certainty.

    Attention and MLP add nothing, so the next token is the one whose embedding has the largest
    product with the last token's.
    """
    model = _model(tied=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(20.0)
    embeddings = model.model.embed_tokens.weight.zero_()
    for axis, (token, successor) in enumerate(successors.items()):
        embeddings[token, axis] = 1.0
        if successor != token:
            embeddings[successor, axis] = 3.0
    save_model(model, folder)


@torch.no_grad()
def save_endless_qwen3(folder, *, seed):
    """Write a random untied model that never ends a completion.

    The first axis of its hidden states is the same large number everywhere, and the output head
    turns it into logits of stop tokens that are far below all others.
    """
    torch.manual_seed(seed)
    save_model(_endless(_model(tied=False)), folder)


@torch.no_grad()
def save_endless_qwen3_moe(folder, *, seed):
    """The same with experts."""
    save_model(_endless(_experts(seed)), folder)


def _endless(model):
    model.model.embed_tokens.weight[:, 0] = 2.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        for name, parameter in layer.mlp.named_parameters():
            if "down_proj" in name:
                parameter[..., 0, :] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[STOP_TOKEN_IDS, 0] = -100.0
    return model


def _experts(seed, *, norm_topk_prob=True, **sizes):
    torch.manual_seed(seed)
    experts = SIZES | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": norm_topk_prob,
    }
    config = Qwen3MoeConfig(**experts | sizes, tie_word_embeddings=False)
    model = Qwen3MoeForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def _model(*, tied):
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)).float()


def save_model(model, folder):
    """Write weights, config and a tokenizer."""
    model.generation_config.eos_token_id = STOP_TOKEN_IDS
    model.save_pretrained(folder)
    _tokenizer(model.config.vocab_size).save_pretrained(folder)


def _tokenizer(size):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<eos>", *alphabet, *(f"word{i}" for i in range(size))][:size]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
