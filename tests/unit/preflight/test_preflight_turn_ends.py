"""A model that never learns a token that stops it is named before it is trained."""

import json

import numpy as np
import pytest
from data_cases import chat_tokenizer

from rlsys.preflight.turn_ends import turn_end_note
from rlsys.types import Sample

TOKENIZER = chat_tokenizer("{{ messages }}")


def sample(text, trained_from=1):
    ids = np.array(TOKENIZER(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return Sample("a:1", ids, np.arange(len(ids)) >= trained_from)


@pytest.fixture
def note(tmp_path):
    def found(eos, *texts):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        return turn_end_note(tmp_path, TOKENIZER, map(sample, texts))

    return found


@pytest.mark.parametrize("eos", [None, [1, 2]])
@pytest.mark.parametrize("text", ["ab</s>", "ab</s>\n"])
def test_answers_that_end_with_eos_need_no_note(note, eos, text):
    assert note(eos, text) is None


def test_an_eos_token_of_generation_config_counts(note):
    end = TOKENIZER.convert_tokens_to_ids("!")
    assert note([1, end], "ab!\n") is None
    assert "ends with '!' (id " in note([1], "ab!\n")


def test_one_answer_that_is_cut_off_is_not_the_rule(note):
    assert note(None, "abc", "ab</s>") is None
    assert note(None) is None
