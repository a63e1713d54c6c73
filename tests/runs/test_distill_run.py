"""Whole runs of `rlsys distill`: a student becomes as good as its teacher, also by itself."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import yaml
from run_cases import RunProcess
from safetensors.torch import load_file

from rlsys.files import read_jsonl, write_jsonl

pytestmark = pytest.mark.system

EXAMPLE = Path(__file__).parents[2] / "examples/distillation"
MIXED = {
    "max_steps": 6,
    "eval_steps": 3,
    "distill": {"lmbda": 0.5, "beta": 0.5},
    "rollout": {"max_completion_length": 16, "max_num_seqs": 8},
    "policy": {"global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
    "checkpoint": {"save_steps": 2},
}
"""Six small steps, on given rows and on the student's own completions."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows and two untrained models, as the example prepares them."""
    folder = tmp_path_factory.mktemp("distill-data")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        spec = importlib.util.spec_from_file_location("prepare_distill", EXAMPLE / "prepare.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        module.main(["--out", str(folder), "--validation", "64"])
    return folder


def start(folder, data, name, *words, subcommand="distill", **changes):
    """A run of a config of the example in a folder of its own."""
    config = yaml.safe_load((EXAMPLE / f"{name}.yaml").read_text())
    config |= {"output_dir": "out", "tracking": {"report_to": "none"}, "seed": 1} | changes
    config["data"] |= {
        "dataset": [str(data / "train.jsonl")],
        "val_dataset": [str(data / "validation.jsonl")],
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return RunProcess(folder, "run.yaml", *words, subcommand=subcommand)


def finished(*args, **changes):
    run = start(*args, **changes)
    assert run.wait() == 0, run.log
    run.end()
    return run


def metrics(run, name):
    """Step -> value."""
    return {row["step"]: row[name] for row in read_jsonl(run.out.metrics) if name in row}


def untrained(data):
    return {"model": {"path": str(data / "student")}, "teacher": {"path": str(data / "teacher")}}


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("mixed"), data, "demo", **MIXED, **untrained(data))


def test_given_rows_and_own_completions_take_turns(mixed):
    own = metrics(mixed, "on_policy")
    assert list(own) == [1, 2, 3, 4, 5, 6]
    assert set(own.values()) == {0.0, 1.0}
    lengths = metrics(mixed, "completions/mean_length")
    assert list(lengths) == [step for step, is_own in own.items() if is_own]
    assert all(0 < length <= 16 for length in lengths.values())
    assert all(loss > 0 for loss in metrics(mixed, "loss").values())
    assert list(metrics(mixed, "eval/loss")) == [0, 3, 6]
    assert len(set(metrics(mixed, "eval/teacher/loss").values())) == 1
    assert (mixed.out.final / "model.safetensors").exists()


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_bits(mixed, data, tmp_path):
    changes = MIXED | untrained(data)
    stopped = start(tmp_path, data, "demo", **changes)
    stopped.wait_for(lambda: stopped.out.metrics.exists() and len(metrics(stopped, "loss")) >= 3)
    stopped.interrupt()
    assert stopped.wait() != 0
    continued = finished(tmp_path, data, "demo", "--checkpoint.resume", **changes)
    for name in ("loss", "grad_norm", "on_policy", "num_tokens"):
        assert metrics(continued, name) == metrics(mixed, name), name
    held_out = metrics(continued, "eval/loss")  # that of step 3 may be what was interrupted
    assert held_out.items() <= metrics(mixed, "eval/loss").items()
    assert {0, 6} <= held_out.keys()
    weights = [load_file(run.out.final / "model.safetensors") for run in (mixed, continued)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_a_student_becomes_as_good_as_its_teacher(data, tmp_path):
    """On held-out rows, within 5%: by given rows, and then by what it writes itself."""
    own = {"model": {"path": str(data / "teacher")}}
    teacher = finished(tmp_path / "teacher", data, "teacher", subcommand="sft", **own)
    taught = {"teacher": {"path": str(teacher.out.final)}}
    student = {"model": {"path": str(data / "student")}}
    off_policy = finished(tmp_path / "off", data, "demo", **student, **taught)
    scores = [
        list(metrics(off_policy, f"eval/{name}mean_token_accuracy").values())
        for name in ("", "teacher/")
    ]
    assert scores[0][0] < 0.5 * scores[1][0]
    assert scores[0][-1] >= 0.95 * scores[1][-1]

    student = {"model": {"path": str(off_policy.out.final)}}
    on_policy = finished(tmp_path / "on", data, "on_policy", max_steps=30, **student, **taught)
    losses = list(metrics(on_policy, "loss").values())
    assert sum(losses[-5:]) < sum(losses[:5])
    score = list(metrics(on_policy, "eval/mean_token_accuracy").values())[-1]
    assert score >= 0.95 * scores[1][-1]


@pytest.mark.slow
def test_grpo_learns_from_a_teacher_alone(data, tmp_path):
    """With rewards of weight 0 the policy comes near the teacher on what it samples."""
    config = {
        "max_steps": 8,
        "eval_steps": None,
        **untrained(data),
        "data": {"max_prompt_length": 100},
        "grpo": {"opd_kl_coef": 1.0, "loss_type": "dapo"},
        "reward": {"reward_funcs": ["format"], "reward_weights": [0.0]},
        "rollout": {"num_generations": 4, "generation_batch_size": 16, "max_completion_length": 12},
        "policy": {"lr": 3e-3, "lr_scheduler_type": "constant"},
    }
    run = start_grpo(tmp_path, data, config)
    assert run.wait() == 0, run.log
    kl = list(metrics(run, "opd_reverse_kl").values())
    assert len(kl) == 8
    assert sum(kl[-2:]) < sum(kl[:2])
    run.end()


def start_grpo(folder, data, config):
    prompts = [{"messages": row["messages"][:-1]} for row in read_jsonl(data / "validation.jsonl")]
    write_jsonl(folder / "prompts.jsonl", prompts)
    config["output_dir"], config["tracking"] = "out", {"report_to": "none"}
    config["data"] |= {"dataset": ["prompts.jsonl"]}
    (folder / "run.yaml").write_text(yaml.safe_dump({**config, "device": "cpu"}))
    return RunProcess(folder, "run.yaml")
