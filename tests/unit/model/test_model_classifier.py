"""Folders of sequence classifiers: transformers' classes, labels, and the token of the score."""

import json

import pytest
from answer_templates import TEMPLATES, tokenizer_of
from config_cases import write_model
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES,
)

from rlsys.config import LoraConfig
from rlsys.model.adapter_folder import write_adapter_config
from rlsys.model.classifier import classifier_config, pad_token_id, stored_label_names
from rlsys.model.families import FAMILIES
from rlsys.model.families.base import SCORE, weight_table
from rlsys.model.lora import adapter_table, plan_lora
from rlsys.model.shape import read_model_shape

CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_names_the_class_of_transformers(model_type):
    family = FAMILIES[model_type]
    assert (family.classifier if family.has_classifier else None) == CLASSES.get(model_type)


def shape_of(folder, num_labels=1, **sizes):
    return read_model_shape(write_model(folder, **sizes), num_labels=num_labels)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_in_the_place_of_the_output_head(tmp_path, tied):
    shape = shape_of(tmp_path, num_labels=3, tie_word_embeddings=tied)
    rows = {row.names[0]: row for row in weight_table(shape)}
    assert "output_layer.weight" not in rows
    assert rows[SCORE].hf_shapes == ((3, shape.hidden_size),)
    assert rows[SCORE].tp_axis is None
    assert shape.num_params == sum(row.num_params for row in rows.values())


def test_what_config_json_says_of_a_classifier(tmp_path):
    shape = shape_of(tmp_path, num_labels=2)
    found = classifier_config(
        tmp_path, shape, pad_token_id=7, label_names=["bad", "good"], problem_type="regression"
    )
    assert found["pad_token_id"] == 7
    assert found["id2label"] == {"0": "bad", "1": "good"}
    assert found["label2id"] == {"bad": 0, "good": 1}
    assert found["architectures"] == [FAMILIES[shape.model_type].classifier]
    old = {"model_type": shape.model_type, "num_labels": 3}
    assert AutoConfig.for_model(**old | found).id2label == {0: "bad", 1: "good"}
    unnamed = classifier_config(tmp_path, shape, pad_token_id=7, label_names=[], problem_type=None)
    assert list(unnamed["label2id"]) == ["LABEL_0", "LABEL_1"]


def test_a_classifier_that_is_trained_on_keeps_its_names(tmp_path):
    named = {"id2label": {"0": "bad", "1": "good"}}
    of_classifier = named | {"architectures": ["Qwen3ForSequenceClassification"]}
    shape = shape_of(tmp_path, num_labels=2, **of_classifier)
    assert stored_label_names(tmp_path, shape) == ["bad", "good"]
    found = classifier_config(tmp_path, shape, pad_token_id=7, label_names=[], problem_type=None)
    assert found["id2label"] == named["id2label"]
    # Numbers say nothing, nor do the names of a language model, which are a default.
    numbers = of_classifier | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    assert stored_label_names(tmp_path, shape_of(tmp_path, num_labels=2, **numbers)) == []
    assert stored_label_names(tmp_path, shape_of(tmp_path, num_labels=2, **named)) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pad_token": "<pad>", "eos_token": "</s>"}, "<pad>"),
        ({"pad_token": {"__type": "AddedToken", "content": "<pad>"}}, "<pad>"),
        ({"eos_token": "</s>"}, "</s>"),
        ({"eos_token": "</s>", "tokenizer_class": "Qwen2Tokenizer"}, "<|endoftext|>"),
        ({}, None),
    ],
)
def test_rows_are_padded_by_the_pad_token_or_eos(tmp_path, config, expected):
    special = ("<pad>", "</s>", "<|endoftext|>")
    tokenizer_of(TEMPLATES["chatml"], special).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CLASS | config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    found = pad_token_id(tokenizer)
    assert (found if found is None else tokenizer.convert_ids_to_tokens(found)) == expected


def test_an_adapter_with_a_head_is_for_classification(tmp_path):
    shape = shape_of(tmp_path / "model")
    plan = plan_lora(LoraConfig(modules_to_save=["score"]), shape)
    names = [name for row in adapter_table(shape, plan) for name in row.hf_names]
    assert names[-1] == "base_model.model.score.weight"
    write_adapter_config(tmp_path, plan, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
