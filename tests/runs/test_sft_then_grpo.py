"""From `rlsys sft` with an adapter to `rlsys grpo`: it goes on, or a merged model begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from run_cases import RunProcess, write_run_files
from safetensors.torch import load_file

from rlsys import cli
from rlsys.files import read_jsonl

pytestmark = [pytest.mark.system, pytest.mark.slow]

RANK = 4


def write_config(folder, **sections):
    path = folder / "run.yaml"
    config = yaml.safe_load(path.read_text())
    for name, value in sections.items():
        is_section = isinstance(value, dict)
        config[name] = config.get(name, {}) | value if is_section else value
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))


@pytest.fixture(scope="module")
def sft(starter_model, tmp_path_factory):
    """A supervised run that trained an adapter on answers of digits."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    write_run_files(folder, starter_model)
    rows = [{"query": f"train {i}", "response": str(i) * 3} for i in range(10)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = dict.fromkeys(("rollout", "reward", "grpo", "checkpoint", "eval_steps"))
    write_config(
        folder,
        max_steps=30,
        data={"max_length": 40},
        policy={"global_batch_size": 5, "lr": 1e-2, "lora": {"rank": RANK}},
        **others,
    )
    config = yaml.safe_load((folder / "run.yaml").read_text())
    del config["data"]["val_dataset"], config["data"]["max_prompt_length"]
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run = RunProcess(folder, "run.yaml", subcommand="sft")
    assert run.wait() == 0, run.log
    yield run
    run.end()


@pytest.fixture(scope="module")
def merged(sft):
    folder = sft.folder / "merged"
    assert cli.main(["export", str(sft.out.path), "--merge", "--to", "hf", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module", params=["adapter", "merged model"])
def grpo(request, sft, merged, starter_model, tmp_path_factory):
    """Two steps of GRPO that begin with what `sft` learned, and how."""
    folder = tmp_path_factory.mktemp("grpo") / "run"
    goes_on = request.param == "adapter"
    write_run_files(folder, starter_model if goes_on else merged)
    lora = {"lora": {"path": str(sft.out.final)}} if goes_on else {}
    write_config(folder, max_steps=2, eval={"temperature": 0.0}, policy=lora)
    run = RunProcess(folder, "run.yaml")
    assert run.wait() == 0, run.log
    yield run, goes_on
    run.end()


def values(run, name):
    return {row["step"]: row[name] for row in read_jsonl(run.out.metrics) if name in row}


def test_grpo_begins_with_what_sft_learned_and_the_reference_is_its_base(grpo, sft):
    run, goes_on = grpo
    assert max(values(run, "sampling/logp_difference/mean").values()) < 1e-5  # fp32
    first = values(run, "kl")[1]
    if goes_on:  # the adapter is off in the reference
        assert first > 1e-2
        before, after = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (sft.out.final, run.out.final)
        )
        assert {name: tensor.shape for name, tensor in after.items()} == {
            name: tensor.shape for name, tensor in before.items()
        }
        assert any((after[name] != tensor).any() for name, tensor in before.items())
        assert json.loads((run.out.final / "adapter_config.json").read_text())["r"] == RANK
    else:
        assert first == pytest.approx(0.0, abs=1e-6)
        assert (run.out.final / "model.safetensors").is_file()


def test_adapter_and_merged_model_are_evaluated_to_where_grpo_begins(
    grpo, sft, merged, starter_model, tmp_path
):
    """`rlsys eval SFT_RUN MERGED BASE GRPO_CONFIG`, and the evaluation before step 1."""
    run, _ = grpo
    models = map(str, (sft.out.path, merged, starter_model))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlsys.cli", "eval", *models, "run.yaml"),
            *("--out", str(tmp_path / "found")),
        ],
        cwd=run.folder,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    of_run = [row["text"] for row in read_jsonl(run.out.eval_completions) if row["step"] == 0]
    scores = []
    for folder in (tmp_path / "found").iterdir():
        if [row["text"] for row in read_jsonl(folder / "eval_completions.jsonl")] == of_run:
            scores.append(json.loads((folder / "eval.json").read_text())["scores"][""])
    assert len(scores) == 2  # and the base says something else
    for score in scores:
        assert score["reward"]["mean"] == pytest.approx(values(run, "eval/reward")[0])
