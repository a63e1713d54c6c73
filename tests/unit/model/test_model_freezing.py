"""What policy.freeze_parameters... leaves untrained, and patterns that do not fit the model."""

import pytest
from config_cases import write_model
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config import PolicyConfig
from rlsys.model.families.base import weight_table
from rlsys.model.freezing import frozen_tensors, num_frozen
from rlsys.model.shape import read_model_shape


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    write_model(folder)
    return read_model_shape(folder)


def frozen(shape, **policy):
    return frozen_tensors(PolicyConfig(**policy), shape)


def test_starts_a_regex_and_exceptions_count_together(shape):
    names = frozen(
        shape,
        freeze_parameters=["model.embed_tokens", "model.layers.1."],
        freeze_parameters_regex=r"layers\.2\.mlp",
        trainable_parameters=["model.layers.1.mlp"],
        trainable_parameters_regex=r"layers\.1.*layernorm",
    )
    assert "model.embed_tokens.weight" in names
    layers = {".".join(name.split(".")[2:4]) for name in names if "layers" in name}
    assert layers == {"1.self_attn", "2.mlp"}


@given(st.floats(0.0, 0.99))
def test_a_ratio_freezes_that_share_from_the_embedding_up(shape, ratio):
    names = frozen(shape, freeze_parameters_ratio=ratio)
    rows = [row for row in weight_table(shape)]
    share = num_frozen(PolicyConfig(freeze_parameters_ratio=ratio), shape) / shape.num_params
    assert share <= ratio
    is_frozen = [row.hf_names[0] in names for row in rows]
    assert is_frozen == sorted(is_frozen, reverse=True)
    following = rows[is_frozen.index(False)].num_params
    assert share + following / shape.num_params > ratio


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"freeze_parameters": ["model.embed_token.x"]}, ["model.embed_tokens"]),
        ({"freeze_parameters_regex": "embbed"}, ["'embbed' is found in no tensor"]),
        (
            {"freeze_parameters": ["model"], "trainable_parameters": ["model.layer.9"]},
            ["policy.trainable_parameters", "model.layers"],
        ),
        ({"freeze_parameters_regex": "."}, ["leave nothing to train"]),
        ({"freeze_parameters_ratio": 1.0}, ["leave nothing to train"]),
        ({"freeze_parameters_regex": "q_proj"}, ["cannot be frozen alone", "k_proj", "v_proj"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused(shape, policy, words):
    with pytest.raises(ValueError, match="policy") as error:
        frozen(shape, **policy)
    assert all(word in str(error.value) for word in words)
