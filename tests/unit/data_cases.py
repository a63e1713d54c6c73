"""A tokenizer whose tokens are words, and files of rows."""

import json
from importlib.util import find_spec
from pathlib import Path

from rlsys.config import DataConfig
from rlsys.data import load_prompts
from rlsys.data.formats import parse_row
from rlsys.data.row import Row

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def word_tokenizer():
    """Words are tokens, and encoding a text puts BOS in front, as Llama's tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "[", "]", "user", "assistant", "system", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def chat_tokenizer(template: str):
    """Bytes are tokens, so that decoding gives the prompt as the template wrote it.

    Args:
        template: a chat template, or the name of one that comes with trl.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if "{" not in template:
        [folder] = find_spec("trl").submodule_search_locations
        template = (Path(folder) / "chat_templates" / f"{template}.jinja").read_text()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {sign: number for number, sign in enumerate(["<s>", "</s>", *sorted(alphabet)])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def write_jsonl(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def load(tokenizer, *sources: str, seed: int = 0, **options):
    return load_prompts(DataConfig(dataset=list(sources), **options), tokenizer, seed=seed)


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def parsed(columns: dict, system: str | None = None) -> Row:
    """A row with these columns after `parse_row`."""
    row = Row(1, "a.jsonl, line 1", columns)
    parse_row(row, system=system)
    return row
