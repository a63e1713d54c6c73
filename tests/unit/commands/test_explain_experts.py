"""`rlsys explain` says what routers choose from, learn and replay, and what of config.json is not
used."""

import json

from config_cases import EXPERTS, values, write_model

from rlsys.commands.explain_experts import describe_experts, describe_replay
from rlsys.config import Config
from rlsys.model.shape import read_model_shape


def described(folder, *, sizes=EXPERTS, **sections):
    write_model(folder / "model", **sizes)
    model_config = json.loads((folder / "model/config.json").read_text())
    config = Config.model_validate(values(**sections))
    shape = read_model_shape(folder / "model")
    experts = describe_experts(config, shape, model_config)
    return dict(experts + describe_replay(config, shape) if experts else experts)


def test_a_dense_model_has_no_such_section(tmp_path):
    assert described(tmp_path, sizes={}) == {}


def test_defaults(tmp_path):
    parts = described(tmp_path)
    assert parts["experts"].startswith("2 of 8 for each token, in 4 of 4 layers")
    assert parts["router's losses"] == "none: nothing balances the experts"
    assert parts["replay"].startswith("off")
    assert "not used" not in parts


def test_what_is_set_and_what_config_json_says_in_vain(tmp_path):
    parts = described(
        tmp_path,
        sizes=EXPERTS | {"router_aux_loss_coef": 0.001, "output_router_logits": False},
        policy={"moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1e-3, "moe_router_dtype": "fp32"},
        rollout={"router_replay": True, "generation_batch_size": 16},
    )
    assert parts["experts"].endswith("router logits in float32")
    assert parts["router's losses"] == (
        "0.01 x load balancing among the tokens of each micro-batch + 0.001 x z loss"
    )
    assert "8 bytes for each token" in parts["replay"]
    assert parts["not used"] == (
        "output_router_logits = False, router_aux_loss_coef = 0.001 in config.json: see "
        "policy.moe_aux_loss_coeff"
    )
