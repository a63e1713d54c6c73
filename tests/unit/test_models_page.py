"""What docs/models.md says about models of text and images."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

from rlsys.model.families import FAMILIES
from rlsys.model.folder_check import check_model_folder
from rlsys.model.shape import read_model_shape

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"


@pytest.mark.parametrize("types", [("mistral3", "ministral3"), ("llava", "gpt2")])
def test_a_model_that_sees_images_is_refused_with_what_to_do(tmp_path, types):
    outer, inner = types
    config = {"model_type": outer, "text_config": {"model_type": inner}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{outer}.* of text and of images.*'{inner}'") as error:
        read_model_shape(tmp_path)
    assert ("save the text model alone, as docs/models.md" in str(error.value)) is (inner != "gpt2")
    assert (f"use a model of type {', '.join(FAMILIES)}" in str(error.value)) is (inner == "gpt2")


def test_the_text_model_of_such_a_model_can_be_saved_alone(tmp_path):
    text = Ministral3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 32.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1,
        },
    )
    vision = PixtralVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    whole = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    whole.save_pretrained(tmp_path / "FOLDER")
    script = runpy.run_path(str(ROOT / "tests/actors/tiny_models.py"))
    script["_tokenizer"](512).save_pretrained(tmp_path / "FOLDER")
    code = PAGE.read_text(encoding="utf-8").partition("```python text-model\n")[2]
    code = code.partition("```")[0]
    code = code.replace('"FOLDER"', repr(str(tmp_path / "FOLDER")))
    exec(code.replace('"NEW"', repr(str(tmp_path / "NEW"))), {})

    new = tmp_path / "NEW"
    check_model_folder(new, read_model_shape(new), has_prompts=False)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "NEW")
    ids = torch.arange(40)[None] + 5
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, whole(input_ids=ids).logits)
