"""Whole GRPO runs with policy.lora: the base is the reference, and engines follow the adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from run_cases import RunProcess, write_run_files
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlsys import cli
from rlsys.files import read_jsonl

pytestmark = pytest.mark.system

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module", params=["merged", pytest.param("adapter", marks=pytest.mark.slow)])
def run(request, starter_model, tmp_path_factory):
    """A run of four steps, and how its engines got the adapter."""
    folder = tmp_path_factory.mktemp("lora") / request.param
    run = run_lora(folder, starter_model, request.param)
    yield run, request.param
    run.end()


def run_lora(folder, model, sync, *words):
    write_run_files(folder, model)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    config["policy"] |= {"lora": LORA, "lr": 1e-2}
    config["weight_sync"] = {"lora": sync}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    run = RunProcess(folder, "run.yaml", *words)
    assert run.wait() == 0, run.log
    return run


def steps(run):
    return [row for row in read_jsonl(run.out.metrics) if "reward" in row]


def nbytes(file):
    return sum(tensor.nbytes for tensor in load_file(file).values())


def test_engines_sample_with_the_policys_adapter_and_the_base_is_the_reference(run, starter_model):
    run, lora = run
    first, *later = steps(run)
    assert len(later) == 3
    assert max(row["sampling/logp_difference/mean"] for row in steps(run)) < 1e-5  # fp32
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # B starts as 0
    assert all(row["kl"] > 1e-6 for row in later)
    base, adapter = (
        nbytes(starter_model / "model.safetensors"),
        nbytes(run.out.final / "adapter_model.safetensors"),
    )
    assert {row["weight_sync/bytes"] for row in steps(run)} == {
        {"merged": base, "adapter": adapter}[lora]
    }
    assert "starting on cpu: policy 1, rollout 1, reward" in run.log  # and no reference


def test_what_it_saves_is_an_adapter_that_export_merges(run, starter_model, tmp_path, monkeypatch):
    run, _ = run
    monkeypatch.chdir(run.folder)
    folders = [run.out.final, *run.out.checkpoints.glob("step-*"), *run.out.hf.glob("step-*")]
    assert len(folders) == 4
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(starter_model)(ids).logits
        for folder in folders:
            model = AutoModelForCausalLM.from_pretrained(starter_model)
            assert not torch.equal(PeftModel.from_pretrained(model, folder)(ids).logits, plain)
    words = ["--merge", "--to", "hf", str(tmp_path / "merged"), "--test_convert_precision"]
    assert cli.main(["export", "out", *words]) == 0


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_to_what_the_run_itself_found(run, tmp_path):
    run, _ = run
    words = ["eval", "out/checkpoints/step-2", "--out", str(tmp_path / "found")]
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.cli", *words],
        cwd=run.folder,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "found" / "eval.json").read_text())
    rows = [row for row in read_jsonl(run.out.metrics) if "eval/reward" in row and row["step"] == 2]
    assert result["scores"][""]["reward"]["mean"] == pytest.approx(rows[0]["eval/reward"])


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["adapter", "merged"])
def test_a_run_ahead_on_several_engines_follows_the_adapter(starter_model, tmp_path, sync):
    words = ["--rollout.max_staleness", "1", "--rollout.num_engines", "2", "--max_steps", "3"]
    run = run_lora(tmp_path / "run", starter_model, sync, *words)
    first, *later = steps(run)
    assert [row["step"] for row in (first, *later)] == [1, 2, 3]
    # What the first version sampled has its log-probs, and what is stale has others.
    assert first["sampling/logp_difference/mean"] < 1e-5
    assert all(row["sampling/logp_difference/mean"] > 1e-5 for row in later)
    assert {row["staleness/max"] for row in later} == {1}
    assert all(row["kl"] > 1e-6 for row in later)
    file = {"adapter": run.out.final / "adapter_model.safetensors"}
    sent = nbytes(file.get(sync, starter_model / "model.safetensors"))
    assert {row["weight_sync/bytes"] for row in (first, *later)} == {sent}
    run.end()
