"""A teacher that does not fit the policy is found before anything starts."""

import json

from config_cases import write_model
from preflight_cases import only

from rlsys.preflight.tokenizers import tokenizer_difference

VOCABULARY = {"a": 0, "b": 1, "c": 2}


def teacher(folder, vocabulary=None, **sizes):
    write_model(folder, **sizes)
    if vocabulary is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return str(folder)


def words(path):
    return ["--grpo.opd_kl_coef", "1", "--teacher.path", path]


def test_a_missing_teacher(problems):
    assert "teacher.path: there is no model folder" in only(problems(*words("./nowhere")))


def test_a_teacher_may_have_another_size_and_more_embeddings(problems, tmp_path):
    folder = teacher(tmp_path / "large", hidden_size=128, vocab_size=512)
    assert problems(*words(folder)) == []


def test_a_teacher_with_another_tokenizer(problems, tmp_path):
    own = teacher(tmp_path / "own", VOCABULARY)
    other = teacher(tmp_path / "other", VOCABULARY | {"b": 2, "c": 1})
    text = only(problems("--model.path", own, *words(other)))
    assert "has another tokenizer than model.path" in text
    assert "2 tokens differ ('b' is 2 for the teacher and 1 for the policy" in text


def test_a_token_that_only_one_of_them_has(tmp_path):
    own, more = (tmp_path / name for name in ("own", "more"))
    teacher(own, VOCABULARY)
    teacher(more, VOCABULARY | {"<think>": 3})
    assert tokenizer_difference(own, own) is None
    assert "'<think>' is 3 for the teacher and missing for the policy" in str(
        tokenizer_difference(own, more)
    )


def test_a_base_model_may_teach(problems, tmp_path):
    """Its chat template may be missing, or write tokens that it was never trained on."""
    ids = VOCABULARY | {"<|im_end|>": 400}  # beyond the embeddings
    own, base = teacher(tmp_path / "own", ids), teacher(tmp_path / "base", ids)
    (tmp_path / "base/chat_template.jinja").write_text("{{ messages }}<|im_end|>")
    assert problems("--model.path", own, *words(base)) == []
    (tmp_path / "base/chat_template.jinja").unlink()
    assert problems("--model.path", own, *words(base)) == []


def test_a_teacher_without_embeddings_for_all_tokens(problems, tmp_path):
    ids = VOCABULARY | {"<think>": 383}
    own = teacher(tmp_path / "own", ids, vocab_size=512)
    small = teacher(tmp_path / "small", ids, vocab_size=383)
    text = only(problems("--model.path", own, *words(small)))
    assert "embeddings for 383 tokens" in text
    assert "the policy reads and samples 384. Save the model after `model.resize_token" in text
    assert problems("--model.path", small, *words(own)) == []


def test_a_teacher_without_a_tokenizer_or_with_a_broken_one(problems, tmp_path):
    own, other = (teacher(tmp_path / name, VOCABULARY) for name in ("own", "other"))
    file = tmp_path / "other/tokenizer.json"
    file.write_text("{")
    text = only(problems("--model.path", own, *words(other)))
    assert text.startswith("teacher.path: ")
    assert "tokenizer.json is not valid JSON" in text
    file.unlink()
    text = only(problems("--model.path", own, *words(other)))
    assert "other holds no tokenizer" in text
    assert "copy the tokenizer's files from there" in text


def test_ranks_that_do_not_divide_the_teacher(problems, tmp_path):
    folder = teacher(tmp_path / "teacher", num_attention_heads=8, num_key_value_heads=2)
    ranks = ["--teacher.world_size", "4", "--teacher.tensor_parallel_size", "4"]
    text = only(problems(*words(folder), *ranks, "--teacher.placement", "own"))
    assert "teacher.tensor_parallel_size = 4" in text
    assert "KV heads 2" in text
