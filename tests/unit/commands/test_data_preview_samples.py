"""What is trained on is seen, with colours and without."""

import io
import re

import pytest
from answer_templates import TEMPLATES, tokenizer_of, unmarked
from data_cases import assistant, user, write_jsonl
from rich.console import Console

from rlsys.commands.data_preview_samples import marked_parts, preview_samples
from rlsys.config import SftDataConfig
from rlsys.data.samples import SampleRules, load_samples


@pytest.fixture
def shown(tmp_path):
    """The preview of some rows, and their samples."""
    tokenizer = tokenizer_of(unmarked(TEMPLATES["chatml"]))

    def preview(rows, *, color=None, encoding="utf-8", num_rows=2, rules=None, **options):
        source = write_jsonl(tmp_path / "a.jsonl", rows)
        config = SftDataConfig(dataset=[source], shuffle=False, **options)
        data = load_samples(config, tokenizer, rules or SampleRules(), seed=0)
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding=encoding)
        console = Console(
            file=file, width=300, color_system=color, force_terminal=color is not None
        )
        preview_samples(config, data, tokenizer, console, num_rows=num_rows)
        file.flush()
        return raw.getvalue().decode(encoding), data.train, tokenizer

    return preview


ROWS = [
    {"messages": [*user("Hi é"), *assistant("Hello 🙂"), *user("[x]"), *assistant("Bye")]},
    {"query": "a", "response": "b" * 400},
]


def test_trained_parts_stand_between_brackets(shown):
    text, samples, _ = shown(ROWS, max_length=300)
    assert "<|im_start|>assistant\n⟦Hello 🙂<|im_end|>⟧\n" in text
    assert "\n⟦Bye<|im_end|>⟧\n" in text
    assert "Between ⟦ and ⟧ stands what is trained on." in text
    [sample] = samples
    assert f"a:1  {len(sample.token_ids)} tokens, {sample.num_targets} trained on" in text
    assert "1 over data.max_length" in text
    assert "1 sample to train on, 0 to evaluate on." in text
    assert re.search(r"tokens, \d+ of them \(\d+%\) trained on", text)


def test_other_encodings_and_colours(shown):
    text, *_ = shown([{"query": "a", "response": "b"}], encoding="ascii")
    assert "[[b<|im_end|>]]" in text
    text, *_ = shown([{"query": "a", "response": "b"}], color="standard")
    assert "\x1b[32m" in text
    assert "⟦" not in text


def test_parts_are_the_whole_text(shown):
    _, samples, tokenizer = shown(ROWS)
    for sample in samples:
        parts = marked_parts(sample, tokenizer)
        assert "".join(text for text, _ in parts) == tokenizer.decode(sample.token_ids)
        trained = "".join(text for text, is_target in parts if is_target)
        assert trained == tokenizer.decode(sample.token_ids[sample.target_mask])


def test_streams_and_cut_rows(shown):
    text, *_ = shown([{"text": "abc" * 30}], max_length=40, rules=SampleRules("pretrain"))
    assert "; 1 cut" in text
    assert "a:1/0  40 tokens, 39 trained on" in text
