"""A help desk in which a reward model can be watched on a CPU: its data, and a model to train.

    python examples/reward_model/prepare.py --out data/help_desk

makes all up, without a network, and writes

    model/                             an untrained Qwen3 of 0.2 million parameters, a tokenizer
    answers.jsonl                      messages that end with an answer of any kind, for `rlsys sft`
    pairs.jsonl, pairs_held_out.jsonl  prompt, chosen and rejected, for `rlsys reward-model`
    topics.jsonl, topics_held_out.jsonl    text and label, the topic, for a classifier
    prompts.jsonl, prompts_held_out.jsonl  prompts for `rlsys grpo`

A chosen answer is friendly and about what was asked. A rejected one is rude, or about something
else. The same seed makes the same rows; a hash of the question decides whether it is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from pathlib import Path
from typing import Any

from rlsys.files import write_jsonl

HELD_OUT_SHARE = 8
"""One question in this number is held out."""
TURN_START, TURN_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MAX_TOKENS = 128

WHO = ("I", "my friend", "my sister", "our team", "a colleague", "my brother", "our guest")
WHEN = ("today", "since Monday", "this morning", "for a week", "since the update", "again")
TOPICS = {
    "password": ("cannot log in", "set a new password with the link on the login page"),
    "parcel": ("did not get the parcel", "follow the parcel with the number in the receipt"),
    "invoice": ("got a wrong invoice", "send the invoice back for a correction"),
    "battery": ("has a battery that is empty at once", "change the battery in any of the shops"),
    "refund": ("wants the money back", "ask for a refund on the order page"),
    "printer": ("has a printer that is offline", "turn the printer off and on again"),
}
"""Topic -> what somebody has, and what to do."""
GREETINGS = ("Hello", "Hi", "Good morning", "Dear all")
FRIENDLY = (
    "Sorry for the trouble! Please {do}.",
    "Thank you for asking. You can {do}.",
    "Happy to help: please {do}, and tell us how it went.",
)
RUDE = (
    "Not our problem. Just {do}.",
    "Read the manual, then {do}.",
    "Again? Go away and {do}.",
)


def generate(n: int, *, seed: int, held_out: bool = False) -> list[dict[str, Any]]:
    """`n` different pairs of the training or the held-out split."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < n:
        topic = rng.choice(list(TOPICS))
        question = _question(rng, topic)
        if _is_held_out(question) != held_out:
            continue
        chosen, bad = _answer(rng, FRIENDLY, topic), _bad_answer(rng, topic)
        rows[f"{question}\n{chosen}\n{bad}"] = {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": bad}],
            "topic": topic,
        }
    return list(rows.values())


def _question(rng: random.Random, topic: str) -> str:
    has, _ = TOPICS[topic]
    greeting, who, when = rng.choice(GREETINGS), rng.choice(WHO), rng.choice(WHEN)
    return f"{greeting}, {who} {has} {when}. What now?"


def _answer(rng: random.Random, style: tuple[str, ...], topic: str) -> str:
    return rng.choice(style).format(do=TOPICS[topic][1])


def _bad_answer(rng: random.Random, topic: str) -> str:
    """A rude answer, or a friendly one about something else."""
    if rng.random() < 0.5:
        return _answer(rng, RUDE, topic)
    return _answer(rng, FRIENDLY, rng.choice([other for other in TOPICS if other != topic]))


def is_good(question: str, answer: str) -> bool:
    """Whether an answer is friendly and about the question: what the rewards should be about."""
    for has, do in TOPICS.values():
        if has in question:
            return answer.strip() in [style.format(do=do) for style in FRIENDLY]
    return False


def _is_held_out(question: str) -> bool:
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest) % HELD_OUT_SHARE == 0


# --- files ---------------------------------------------------------------------------------------


def answers(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Conversations with either answer, as often one as the other."""
    return [
        {"messages": [*row["prompt"], *row[kind]]}
        for row in pairs
        for kind in ("chosen", "rejected")
    ]


def topics(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with the name of their topic."""
    return [{"text": row["prompt"][0]["content"], "label": row["topic"]} for row in pairs]


def prompts(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every question once."""
    texts = dict.fromkeys(row["prompt"][0]["content"] for row in pairs)
    return [{"messages": [{"role": "user", "content": text}]} for text in texts]


def write_model(folder: Path, *, seed: int) -> None:
    """Write the untrained model, with a tokenizer that was trained on such texts."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    rows = answers(generate(2000, seed=7))
    texts = [message["content"] for row in rows for message in row["messages"]]
    backend.train_from_iterator([*texts, "user\n", "assistant\n"], trainer)
    backend.add_special_tokens([AddedToken(t, special=True) for t in (PAD, TURN_START, TURN_END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Command line: write the model and the files."""
    parser = argparse.ArgumentParser(
        description="Write pairs of answers, labelled texts, prompts and a tiny model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="pairs to train on")
    parser.add_argument("--validation", type=int, default=200, help="held-out pairs")
    parser.add_argument("--seed", type=int, default=0, help="seed of rows and model")
    args = parser.parse_args(argv)
    train = generate(args.train, seed=args.seed)
    held_out = generate(args.validation, seed=args.seed, held_out=True)
    files = {
        "answers": answers(train),
        "pairs": [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in train],
        "pairs_held_out": [
            {name: row[name] for name in ("prompt", "chosen", "rejected")} for row in held_out
        ],
        "topics": topics(train),
        "topics_held_out": topics(held_out),
        "prompts": prompts(train),
        "prompts_held_out": prompts(held_out),
    }
    for name, rows in files.items():
        path = args.out / f"{name}.jsonl"
        print(f"{path}: {write_jsonl(path, rows)} rows")
    write_model(args.out / "model", seed=args.seed)
    print(f"{args.out / 'model'}: an untrained model")


if __name__ == "__main__":
    main()
