"""Which tokens end a completion: all EOS tokens that the model folder names."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlsys.engines.stop_tokens import read_stop_token_ids

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
    assert read_stop_token_ids(*model_folder(tmp_path, **named)) == expected


def test_a_folder_without_generation_config_is_fine(tmp_path):
    folder, tokenizer = model_folder(tmp_path, model=2)
    (folder / "generation_config.json").unlink()
    assert read_stop_token_ids(folder, tokenizer) == [2]


def test_no_eos_token_at_all_is_an_error_that_says_where_to_put_one(tmp_path):
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*generation_config\.json"):
        read_stop_token_ids(*model_folder(tmp_path))
