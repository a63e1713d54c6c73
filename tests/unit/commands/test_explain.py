"""`rlsys explain` prints what a run would do."""

import io
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from config_cases import write_config, write_run
from reward_models import save_reward_model
from rich.console import Console

from rlsys.commands.explain import explain
from rlsys.commands.explain_batches import batch_arithmetic
from rlsys.config.fields import config_fields, optional_sections, show_value
from rlsys.config.load import load_config
from rlsys.config.roles import plan_roles
from rlsys.model.memory import (
    GIB,
    estimate_reward_model,
)
from rlsys.rewards import orms

pytestmark = pytest.mark.processes

EXAMPLES = Path(__file__).parents[3] / "examples"


def printed(path, *overrides) -> tuple[bool, str]:
    text = io.StringIO()
    ok = explain(load_config(path, overrides), Console(file=text, width=160))
    return ok, text.getvalue()


@pytest.mark.parametrize(("placement", "gpus"), [("policy", 0), ("own", 1)])
def test_reward_models_share_the_policys_gpus_or_have_their_own(tmp_path, placement, gpus):
    reward = {"reward_funcs": [], "reward_model": ["A", "B"], "reward_model_placement": placement}
    config = load_config(write_config(tmp_path, reward=reward)).config
    for device, expected in (("cuda", gpus), ("cpu", 0)):
        roles = [r for r in plan_roles(config, device=device) if r.name == "reward_model"]
        assert [(role.rank, role.gpus) for role in roles] == [(0, expected), (1, expected)]
        shares = device == "cuda" and placement == "policy"
        assert {role.shares_gpu_of for role in roles} == {("policy", 0) if shares else None}


def test_reward_models_are_shown_with_the_memory_of_their_weights(tmp_path):
    _, model = save_reward_model(tmp_path / "judge")
    folder, numbers = str(tmp_path / "judge"), sum(p.numel() for p in model.parameters())
    reward = {"reward_funcs": [], "reward_model": [folder, str(tmp_path / "model")]}
    path = write_run(tmp_path, reward=reward)
    ok, text = printed(path)
    assert ok, text
    assert "reward_model x 2" in text
    assert "reward_model weights = the size of its files" in text
    (tmp_path / "model" / "model.safetensors").unlink()
    ok, text = printed(path)
    assert f"not in the estimate: reward_model:{tmp_path / 'model'}" in text
    for dtype, width in (("bfloat16", 2), ("float32", 4)):
        estimate = estimate_reward_model(tmp_path / "judge", dtype=dtype, device="cpu")
        assert estimate.gib["weights"] == numbers * width / GIB
    by_files = estimate_reward_model(tmp_path / "judge", dtype="auto", device="cpu")
    assert by_files.gib["weights"] == pytest.approx(numbers * 4 / GIB, rel=0.1)


def test_a_reward_class_that_a_run_could_not_make_is_not_ready(tmp_path):
    registered = dict(orms.data)
    code = "from rlsys.rewards import ORM, orms\nclass Unready(ORM):\n"
    code += "    def __init__(self):\n        open('no such model')\n"
    code += "    def __call__(self, completions, **columns):\n        return []\n"
    (tmp_path / "unready.py").write_text(f"{code}orms['unready'] = Unready\n")
    files = {"external_plugins": [str(tmp_path / "unready.py")]}
    # A file of rewards and preprocessors may be listed in either place.
    for sections in ({"reward": files}, {"data": files}):
        ok, text = printed(write_run(tmp_path, **sections), "--reward.reward_funcs", "unready")
        assert not ok
        assert "open('no such model')" in text
        assert "Ready to run." not in text
    orms.data.clear()
    orms.data.update(registered)


def test_data_on_the_hub_is_ready_and_named_as_not_read(tmp_path):
    path = write_run(tmp_path)
    assert "not looked at" not in printed(path)[1]
    _, text = printed(path, "--data.dataset", f"{tmp_path / 'train.jsonl'}", "owner/rows#5")
    assert "Ready to run." in text
    assert "Not on this machine, so not looked at: owner/rows. A run asks the hub." in text


def test_every_field_is_shown_with_its_origin(tmp_path):
    options = ["--policy.lr", "1e-5", "--policy.lora.rank", "3"]
    ok, text = printed(write_run(tmp_path), *options)
    assert ok
    assert "Ready to run." in text
    (line,) = [line for line in text.splitlines() if line.split()[:2] == ["rank", "3"]]
    assert line.split()[2:4] == ["command", "line"]
    for name in set(config_fields()) - set(optional_sections()):
        assert f" {name.rpartition('.')[2]} " in text.replace("\n", " ")
    (line,) = [line for line in text.splitlines() if line.split()[:1] == ["lr"]]
    assert line.split()[1:4] == ["1e-05", "command", "line"]


def test_a_stored_adapter_is_explained_as_it_is(tmp_path):
    stored = '{"peft_type": "LORA", "r": 48, "lora_alpha": 6, "lora_dropout": 0.5, '
    stored += '"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}'
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(stored)
    path = write_run(tmp_path, policy={"lora": {"path": str(tmp_path / "adapter")}})
    _, text = printed(path, "--device", "cuda")
    assert "vLLM takes no whole modules, and policy.lora.modules_to_save has lm_head" in text
    assert "adapter alone" not in text
    assert re.search(r"\n  rank +48 +adapter ", text), text
    # Engines do not sample with dropout, so the policy computes its own log-probs.
    assert "computed by the policy before the update" in text
    _, text = printed(path, "--policy.lora.dropout", "0")
    assert re.search(r"\n  dropout +0(.0)? +command line ", text), text
    assert "computed by the policy before the update" not in text


def test_the_batch_arithmetic(tmp_path):
    path = write_config(
        tmp_path,
        max_steps=5,
        rollout={"num_generations": 8, "generation_batch_size": 64, "num_engines": 2},
        grpo={"num_iterations": 2},
        policy={
            "world_size": 4,
            "tensor_parallel_size": 2,
            "global_batch_size": 32,
            "micro_batch_size": 3,
            "warmup_ratio": 0.1,
        },
    )
    first_words = {name.strip(): text for name, text in batch_arithmetic(load_config(path).config)}
    assert first_words["prompts per step (P)"].startswith("8 = ")
    assert first_words["completions an engine"].startswith("32 = ")
    assert first_words["completions an engine"].endswith(", at most 256 at once (max_num_seqs)")
    assert first_words["optimizer steps per rollout"].startswith("4 = ")
    assert first_words["of these, a rank has"].startswith("16 = ")
    assert first_words["in micro-batches"].startswith("6 of up to 3 completions, at most 384")
    assert (
        "5 steps: 40 prompts, 320 completions, 20 optimizer steps (2 of"
        in (first_words["the whole run"])
    )


@pytest.mark.parametrize(
    ("every", "says"),
    [
        (2, "3: before the first step, and after every 2 of 5 steps"),
        (500, "1: before the first step, and not again: eval_steps 500 is more than the 5 steps"),
    ],
)
def test_evaluations_are_counted(tmp_path, every, says):
    path = write_config(tmp_path, max_steps=5, eval_steps=every, data={"split_dataset_ratio": 0.1})
    assert dict(batch_arithmetic(load_config(path).config))["evaluations"] == says


def test_epochs_are_counted(tmp_path):
    _, text = printed(write_run(tmp_path))
    assert "2.00 = 40 prompts / 20 rows" in text


def test_steps_of_epochs_are_counted(tmp_path):
    path = write_run(tmp_path, max_steps=None, num_train_epochs=3)
    ok, text = printed(path)
    assert ok
    assert "3 x 20 rows (less those over max_prompt_length) / P 4 = 15 steps" in text
    assert "15 steps: 60 prompts, 240 completions, 15 optimizer steps" in text
    assert "3.00 = 60 prompts / 20 rows" in text
    _, text = printed(path, "--max_steps", "2")
    assert "= 15 steps; max_steps 2 wins" in text
    assert "2 steps: 8 prompts" in text
    table = pyarrow.table({"prompt": ["1 + 1?"] * 8, "nums": [[1, 1]] * 8, "target": [2] * 8})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    _, text = printed(path, "--data.dataset", str(tmp_path / "t.parquet"))
    assert "3 x 8 rows (less those over max_prompt_length) / P 4 = 6 steps" in text
    _, text = printed(path, "--data.dataset", "org/name")
    assert "known when the rows are counted, at the start of the run" in text


def test_problems_anywhere_fail_it_and_those_of_this_machine_do_not(tmp_path):
    path = write_run(tmp_path)
    ok, text = printed(path, "--reward.reward_funcs", "nothing")
    assert not ok
    assert "unknown reward function 'nothing'" in text
    ok, text = printed(path, "--model.path", "./nowhere")
    assert ok
    assert "memory not estimated" in text
    assert "Not ready on this machine" in text


def test_a_layout_for_another_model_is_a_problem_and_the_rest_is_shown(tmp_path):
    words = "--policy.world_size 2 --policy.pipeline_parallel_size 2 --policy.pipeline_layout"
    ok, text = printed(write_run(tmp_path), *words.split(), "Et*9|t*9L")
    assert not ok
    assert "Memory not estimated: policy.pipeline_layout is for another model" in text
    assert "policy.pipeline_layout = Et*9|t*9L has 18 layers t, and the model has" in text


def test_the_run_that_users_start_from_is_accepted(offline):
    ok, text = printed(EXAMPLES / "countdown" / "qwen2.5_3b.yaml")
    assert ok
    assert "Actors on cuda" in text


# --- roles ---------------------------------------------------------------------------------------


def test_each_actor_has_its_devices(tmp_path):
    path = write_config(
        tmp_path,
        rollout={"num_engines": 2, "tensor_parallel_size": 2},
        policy={"world_size": 2, "cpu_threads": 3},
        reward={"num_workers": 2},
        grpo={"beta": 0.1},
    )
    config = load_config(path).config
    roles = plan_roles(config, device="cuda")
    assert [(r.name, r.rank, r.gpus) for r in roles] == [
        ("policy", 0, 1),
        ("policy", 1, 1),
        ("rollout", 0, 2),
        ("rollout", 1, 2),
        ("reference", 0, 0),  # on the policy's
        ("reward", 0, 0),
        ("reward", 1, 0),
    ]
    assert [r.cpu_threads for r in roles if r.name == "policy"] == [3, 3]
    assert all(r.gpus == 0 for r in plan_roles(config, device="cpu"))


def test_engines_share_gpus(tmp_path):
    path = write_config(tmp_path, rollout={"num_engines": 4, "engines_per_gpu": 2})
    config = load_config(path).config
    engines = [r for r in plan_roles(config, device="cuda") if r.name == "rollout"]
    assert [r.gpus for r in engines] == [1, 0, 1, 0]
    assert [r.shares_gpu_of for r in engines] == [None, ("rollout", 0), None, ("rollout", 2)]
    on_cpu = [r for r in plan_roles(config, device="cpu") if r.name == "rollout"]
    assert {(r.gpus, r.shares_gpu_of) for r in on_cpu} == {(0, None)}
    rollout = config.rollout.model_dump()
    path = write_run(tmp_path, device="cuda", rollout=rollout, grpo={"beta": 0.1})
    ok, text = printed(path)
    assert ok, text
    assert re.search(r"policy x 1 +1 GPU each: number 0", text)  # what the reference shares, too
    assert re.search(r"rollout x 4 +2 share a GPU: number 1 to 2", text)
    assert "3 GPUs" in text


def test_beta_0_builds_no_reference(tmp_path):
    config = load_config(write_config(tmp_path)).config
    assert "reference" not in {role.name for role in plan_roles(config, device="cuda")}


def test_a_text_that_looks_like_a_number_is_shown_as_a_text():
    assert (
        show_value({"a": ["1e-3", "null", "no", "", 1e-3]})
        == '{a: ["1e-3", "null", no, "", 0.001]}'
    )
