"""Which tokens end a completion: all EOS tokens that the model folder names."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlsys.config import RolloutConfig
from rlsys.model.stop_tokens import read_stop_rules


def rules(folder, tokenizer, **rollout):
    config = RolloutConfig(generation_batch_size=8, **rollout)
    return read_stop_rules(folder, tokenizer, config)


VOCABULARY = {"<eos>": 0, "<end>": 1, "a": 2}


def model_folder(tmp_path, *, generation=None, model=None, tokenizer_eos=None):
    for name, eos in (("generation_config.json", generation), ("config.json", model)):
        content = {} if eos is None else {"eos_token_id": eos}
        (tmp_path / name).write_text(json.dumps(content))
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="a"))
    return tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer_eos)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"generation": [7, 5], "model": 5, "tokenizer_eos": "<end>"}, [1, 5, 7]),
        ({"generation": 3}, [3]),
        ({"model": [4]}, [4]),
        ({"tokenizer_eos": "<eos>"}, [0]),
    ],
)
def test_every_eos_token_counts_wherever_it_is_named(tmp_path, named, expected):
    assert rules(*model_folder(tmp_path, **named)).token_ids == expected


def test_a_folder_without_generation_config_is_fine(tmp_path):
    folder, tokenizer = model_folder(tmp_path, model=2)
    (folder / "generation_config.json").unlink()
    assert rules(folder, tokenizer).token_ids == [2]


def test_no_eos_token_at_all_is_an_error_that_says_where_to_put_one(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no end-of-sequence token.*generation_config\.json.*rollout\.stop_token_ids",
    ):
        rules(*model_folder(tmp_path))


def test_a_base_model_without_eos_stops_by_the_config(tmp_path):
    folder, tokenizer = model_folder(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    found = rules(folder, tokenizer, stop_token_ids=[2], stop=["<turn>", "\nQuestion:"])
    assert found.eos_token_ids == []
    assert found.token_ids == [2, tokenizer.get_added_vocab()["<turn>"]]
    assert found.texts == ["\nQuestion:"]  # no special token, so vLLM looks for it in the text


def test_stops_of_the_config_come_besides_eos(tmp_path):
    found = rules(*model_folder(tmp_path, model=1), stop_token_ids=[2, 1])
    assert (found.eos_token_ids, found.more_token_ids, found.token_ids) == ([1], [2], [1, 2])


@pytest.mark.parametrize("keeps", [False, True])
def test_the_stop_leaves_the_text_unless_it_is_to_stay(tmp_path, keeps):
    folder, tokenizer = model_folder(tmp_path, model=1)
    stops = {"stop_token_ids": [2], "stop": ["</answer>", "END"]}
    found = rules(folder, tokenizer, **stops, include_stop_str_in_output=keeps)
    assert found.tokens_of_text([7, 1]) == [7]  # EOS never stays
    assert found.tokens_of_text([7, 2]) == ([7, 2] if keeps else [7])
    assert found.tokens_of_text([7, 8]) == [7, 8]  # a text ended it
    assert found.cut("a</answer>\n") == ("a</answer>" if keeps else "a")
    assert found.cut("a END </answer>") == ("a END" if keeps else "a ")
    assert found.cut("nothing") == "nothing"


def test_a_stop_token_that_the_model_does_not_have(tmp_path):
    folder, tokenizer = model_folder(tmp_path, model=1)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 3}))
    assert rules(folder, tokenizer, stop_token_ids=[2]).token_ids == [2]
    with pytest.raises(ValueError, match=r"stop_token_ids: .* has 3 tokens.* 3, 99"):
        rules(folder, tokenizer, stop_token_ids=[3, 99])


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match="at least 1 character"):
        RolloutConfig(generation_batch_size=8, stop=[""])
