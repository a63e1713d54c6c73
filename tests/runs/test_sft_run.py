"""Whole runs of `rlsys sft`: what they log is what they save; interruptions change nothing."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from run_cases import RunProcess
from safetensors.torch import load_file
from test_sft_policy import loss_of_transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.cores import usable_cores
from rlsys.files import read_jsonl
from rlsys.records import open_run
from rlsys.run.kept import checkpoint_steps
from rlsys.timeline.shares import time_shares
from rlsys.timeline.spans import span_of
from rlsys.types import Sample

pytestmark = pytest.mark.system

STEPS = 60
ANSWER = "It is {}."


def write_files(folder, model):
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(21)), ("validation", range(30, 35))):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{n} + {n}?" * (1 + n % 3)},
                    {"role": "assistant", "content": ANSWER.format(2 * n)},
                ]
            }
            for n in numbers
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    config = {
        "output_dir": "out",
        "max_steps": STEPS,
        "eval_steps": 20,
        "seed": 1,
        "device": "cpu",
        "data": {
            "dataset": ["train.jsonl"],
            "val_dataset": ["validation.jsonl"],
            "max_length": 100,
        },
        "model": {"path": str(model)},
        "sft": {"group_by_length": True},
        "policy": {"global_batch_size": 4, "max_tokens_per_micro_batch": 120, "lr": 1e-3},
        "checkpoint": {"save_steps": 10},
        "tracking": {"report_to": "none"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def start(folder, *words):
    return RunProcess(folder, "run.yaml", *words, subcommand="sft")


@pytest.fixture(scope="module")
def run(starter_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "run"
    write_files(folder, starter_model)
    run = start(folder)
    assert run.wait() == 0, run.log
    yield run
    run.end()


def metrics(run, name):
    """Step -> value."""
    return {row["step"]: row[name] for row in read_jsonl(run.out.metrics) if name in row}


def test_the_logged_loss_is_that_of_the_saved_model(run):
    losses, held_out = metrics(run, "loss"), metrics(run, "eval/loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] / 2
    assert list(held_out) == [0, 20, 40, 60]
    assert metrics(run, "epoch")[21] == pytest.approx(4.0)  # 21 steps of 4 samples, of 21
    tokenizer = AutoTokenizer.from_pretrained(run.out.final)
    samples = []
    for row in read_jsonl(run.folder / "validation.jsonl"):
        messages = row["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        head, ids = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, whole)
        )
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        mask = np.array([len(head) <= i < end for i in range(len(ids))])
        samples.append(Sample("", np.array(ids, dtype=np.int32), mask))
    model = AutoModelForCausalLM.from_pretrained(run.out.final, dtype=torch.float32)
    assert held_out[STEPS] == pytest.approx(loss_of_transformers(model, samples).item(), abs=1e-5)


def test_the_time_of_every_step_is_on_record(run):
    spans = [span_of(row) for row in open_run(run.out.path).timeline()]
    shares = time_shares(spans)
    assert shares.steps == list(range(1, STEPS + 1))
    of_loop = {"data", "policy_update", "log", "evaluation", "checkpoint"}
    assert of_loop <= shares.phases.keys()
    phases = shares.actors["policy rank 0"].phases
    assert {"update", "predictions", "checkpoint"} <= phases.keys()
    assert "Where the time went, steps 1 to 60: " in run.log


def has_saved(run, *, after):
    return max(checkpoint_steps(run.out.checkpoints), default=0) > after


@pytest.mark.slow
def test_kills_and_a_damaged_checkpoint_change_nothing(run, starter_model, tmp_path):
    """kill -9 in the middle of saves; one that is damaged afterwards is passed over, and said."""
    folder = tmp_path / "killed"
    write_files(folder, starter_model)
    words = ("--checkpoint.save_steps", "1", "--checkpoint.resume", "--overwrite")
    for steps in (7, 19, 31):
        killed = start(folder, *words)
        killed.wait_for(partial(has_saved, killed, after=steps))
        killed.end()
        killed.wait_for_no_process()
    newest = checkpoint_steps(killed.out.checkpoints)[-1]
    weights = killed.out.checkpoints / f"step-{newest}/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ended = start(folder, *words)
    assert ended.wait() == 0, ended.log
    assert f"the checkpoint of step {newest} cannot be continued from: model.safet" in ended.log
    assert metrics(ended, "loss") == metrics(run, "loss")
    finals = [load_file(r.out.final / "model.safetensors") for r in (run, ended)]
    assert all(torch.equal(finals[1][name], tensor) for name, tensor in finals[0].items())


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_bits(run, starter_model, tmp_path):
    write_files(tmp_path / "stopped", starter_model)
    stopped = start(tmp_path / "stopped")
    stopped.wait_for(lambda: stopped.out.metrics.exists() and len(metrics(stopped, "loss")) >= 13)
    stopped.interrupt()
    assert stopped.wait() != 0
    assert "saved step" in stopped.log
    assert not stopped.out.final.exists()
    continued = start(tmp_path / "stopped", "--checkpoint.resume")
    assert continued.wait() == 0, continued.log
    for name in ("loss", "grad_norm", "eval/loss", "num_tokens", "epoch"):
        assert metrics(continued, name) == metrics(run, name), name
    threads = [yaml.safe_load(r.out.config.read_text())["policy"] for r in (run, continued)]
    assert [policy["cpu_threads"] for policy in threads] == [usable_cores()] * 2
    weights = [load_file(r.out.final / "model.safetensors") for r in (run, continued)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    continued.end()
