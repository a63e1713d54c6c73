"""`rlsys replay`: a dumped step is taken again, and the first place that is not finite is named."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from policy_cases import LAYOUTS, policy_config, random_batch

from rlsys.commands.replay import replay_config, report
from rlsys.engines.step_dump import read_step

pytestmark = pytest.mark.system


def dumped(lab, config, batch, damage=None, *, first=None):
    """Update with a batch that is not finite; returns the dump and the last lines of `rlsys`."""
    policy = lab.policy(config)
    if first is not None:
        policy.update(first)
    if damage is not None:
        policy.call("damage", *damage)
    assert policy.update(batch).metrics["fault/nonfinite_steps"] == 1
    (folder,) = Path(config.output_dir, "dumps").iterdir()
    return read_step(folder)


def config_has_adapter(dump):
    return dump.weights is not None and (dump.weights / "adapter_config.json").exists()


def replayed(lab, dump, *words):
    """What the command finds, on the lab's processes."""
    policy = lab.policy(replay_config(dump, words))
    adapter = (
        dump.weights if dump.weights and (dump.weights / "adapter_config.json").exists() else None
    )
    results = policy.call("replay", dump.step, adapter)
    findings = sorted((f for found, _ in results for f in found), key=lambda one: one.key())
    assert all(found == results[0][1] for _, found in results)
    return list(report(dump.step, findings)), results[0][1]


def config_of(folder, tmp_path, **policy):
    config = policy_config(folder, nonfinite_dumps=3, **policy)
    return config.model_copy(update={"output_dir": str(tmp_path / "run")})


def test_a_poisoned_advantage_is_found_at_its_row_and_token(lab, policy_models, tmp_path):
    batch = random_batch(2)
    batch.advantages[5, 9] = torch.nan
    config = config_of(policy_models["qwen3-tied"], tmp_path)
    dump = dumped(lab, config, batch, first=random_batch(1))
    for field in fields(batch):
        value, stored = getattr(batch, field.name), getattr(dump.step.batch, field.name)
        if torch.is_tensor(value):
            assert torch.equal(value.nan_to_num(-9), stored.nan_to_num(-9)), field.name
        else:
            assert value == stored
    assert not list(dump.folder.rglob("*.pt")) + list(dump.folder.rglob("*.p*k*l*"))
    lines, found = replayed(lab, dump)
    assert found == dump.fault.found == {"loss": 1, "gradient": 1, "advantages": 1}
    assert lines[0] == "batch          advantages of row 5, token 9: nan"
    assert any(line.startswith("loss           row 5: nan") for line in lines)
    assert any("the loss by log-probs: row 5, token 9 " in line for line in lines)
    assert lines[-1] == "First: batch, advantages of row 5, token 9: nan"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one rank", "TP 2", "PP 2", "DP 2", "CP 2", "TP 2 x PP 2"])
def test_a_damaged_weight_is_found_by_layer_name_and_tokens(lab, policy_models, tmp_path, layout):
    config = config_of(policy_models["qwen3-tied"], tmp_path, **LAYOUTS[layout])
    # A dump has the weights of the first replica.
    rank = 0 if layout in ("DP 2", "CP 2") else config.policy.world_size - 1
    damage = ("weight", "layers.0.mlp.linear_fc2.weight", rank)
    dump = dumped(lab, config, random_batch(2), damage, first=random_batch(1))
    assert list(dump.fault.weights) == [rank]
    lines, found = replayed(lab, dump)
    assert found.keys() == dump.fault.found.keys() == {"loss", "gradient", "logprobs"}
    # Hugging Face's names count the layers of all stages, megatron-core's those of one.
    name = f"(model.layers.{int('PP' in layout)}.mlp.down_proj.weight)"
    assert lines[0].startswith(f"weights        decoder.layers.0.mlp.linear_fc2.weight {name}")
    forward = [line for line in lines if line.startswith("forward pass ")]
    assert "linear_fc2: row" in forward[0]
    assert any(line.startswith("gradient ") for line in lines)


@pytest.mark.slow
def test_damage_of_a_replica_that_is_not_in_the_dump_is_named(lab, policy_models, tmp_path):
    config = config_of(policy_models["qwen3-tied"], tmp_path, **LAYOUTS["DP 2"])
    damage = ("weight", "layers.0.mlp.linear_fc2.weight", 1)
    dump = dumped(lab, config, random_batch(2), damage, first=random_batch(1))
    (name,) = dump.fault.weights[1]
    assert name.endswith("layers.0.mlp.linear_fc2.weight")
    assert replayed(lab, dump) == ([], {})  # here everything is finite


@pytest.mark.slow
def test_a_step_with_an_adapter_is_replayed_with_its_weights(lab, policy_models, tmp_path):
    lora = {"rank": 4}
    config = config_of(policy_models["qwen3-tied"], tmp_path, lora=lora)
    batch = random_batch(2)
    batch.advantages[2, 9] = torch.inf
    dump = dumped(lab, config, batch, first=random_batch(1))
    assert (dump.weights / "adapter_model.safetensors").exists()
    _, found = replayed(lab, dump)
    assert found == dump.fault.found
    healthy = replace(dump.step.batch, advantages=random_batch(2).advantages)
    dump = replace(dump, step=replace(dump.step, batch=healthy))
    lines, found = replayed(lab, dump)
    assert (lines, found) == ([], {})


@pytest.mark.slow
def test_the_command_finds_it_too_and_takes_another_layout(lab, policy_models, tmp_path):
    batch = random_batch(2)
    batch.rollout_logprobs[1, 8] = -torch.inf
    config = config_of(policy_models["llama-tied"], tmp_path, **LAYOUTS["DP 2"])
    dump = dumped(lab, config, batch)
    about = json.loads((dump.folder / "step.json").read_text())
    assert about["packages"]["torch"] == torch.__version__
    assert about["weights"] is None  # before the first step they are those of model.path
    words = ["-m", "rlsys.cli", "replay", str(dump.folder), "--policy.world_size", "1"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "First: batch, rollout_logprobs of row 1, token 8: -inf" in done.stdout
    assert "As in the run: 1 value of rollout_logprobs." in done.stdout
