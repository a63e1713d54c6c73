"""`rlsys distill` on bad input: each is one clear error before Ray starts."""

import json
import sys

import pytest
from config_cases import write_distill_run, write_run, write_sft_run

from rlsys import cli


@pytest.fixture(autouse=True)
def _no_run_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "rlsys.launch", None)


def refused(capsys, *words) -> str:
    """What is printed for a command line that is wrong input."""
    try:
        code = cli.main(list(map(str, words)))
    except SystemExit as error:
        code = error.code
    assert code == cli.WRONG_INPUT
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--teacher.path null", "teacher.path: is missing: set it to the folder or hub id"),
        ("--teacher.path ./nowhere", "teacher.path: there is no model folder './nowhere'"),
        ("--distill.beta 1.5", "distill.beta = 1.5"),
        ("--distill.beta -0.1", "distill.beta = -0.1"),
        ("--distill.temperature 0", "distill.temperature = 0"),
        ("--distill.loss_top_k 384", "loss_top_k = 384 is not less than the 384 tokens"),
        ("--teacher.world_size 2", "teacher.world_size = 2 is more than the policy's ranks"),
        (
            "--teacher.world_size 8 --teacher.placement own",
            "makes 8 replicas, and a step has 4 rows for them (policy.global_batch_size)",
        ),
        ("--sft.loss_on nothing", "sft.loss_on = 'nothing'"),
        ("--distill.lmbda 2", "distill.lmbda = 2"),
        (
            "--distill.lmbda 0 --rollout.temperature 0.7",
            "rollout.temperature = 0.7 changes nothing, since with distill.lmbda = 0",
        ),
        (
            "--distill.lmbda 0 --weight_sync.bucket_mb 8",
            "weight_sync.bucket_mb = 8 changes nothing, since with distill.lmbda = 0",
        ),
        ("--rollout.engines_per_gpu 2", "rollout.num_engines = 1 is not a multiple of"),
        ("--sft.thinking ignore", "sft.thinking = ignore leaves no whole answer"),
        (
            "--policy.max_tokens_per_micro_batch 100",
            "does not hold data.max_length + rollout.max_completion_length",
        ),
        ("--rollout.tensor_parallel_size 16", "rollout.tensor_parallel_size = 16"),
        ("--max_steps null", "max_steps: is missing, and so is num_train_epochs"),
        ("--grpo.beta 0.1", "grpo.beta: there is no such field"),
        ("--policy.global_batch_size 40", "has 20 samples to train on, and a step takes 40"),
    ],
)
def test_wrong_values_are_refused_before_anything_starts(tmp_path, capsys, words, says):
    config = write_distill_run(tmp_path)
    assert says in refused(capsys, "distill", config, *words.split())


def test_a_student_that_samples_takes_a_gpu_more(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("rlsys.preflight.machine.visible_gpus", lambda: 1)
    monkeypatch.setattr("rlsys.preflight.machine.device_of_packages", lambda: None)
    config = write_distill_run(tmp_path)
    text = refused(capsys, "distill", config, "--device", "cuda", "--distill.lmbda", "0.5")
    assert "the run needs 2 GPUs (policy 1, rollout 1), and this machine shows 1: set" in text
    assert "distill.lmbda to 0, where the student samples nothing, or add GPUs" in text
    assert "placement" not in text


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path, capsys):
    config = write_distill_run(tmp_path)
    text = refused(capsys, "distill", config, "--teacher.path", tmp_path / "model")
    assert "is model.path, which has nothing to learn from itself" in text


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path, capsys):
    config = write_distill_run(tmp_path)
    for name, vocabulary in (("model", {"a": 0, "b": 1}), ("teacher", {"a": 1, "b": 0})):
        file = tmp_path / name / "tokenizer.json"
        file.write_text(json.dumps({"model": {"vocab": vocabulary}}))
    text = refused(capsys, "distill", config)
    assert "has another tokenizer than model.path" in text
    assert "'a' is 1 for the teacher and 0 for the policy" in text


def test_rows_are_those_of_sft(tmp_path, capsys):
    config = write_distill_run(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"messages": "no list"}\n')
    text = refused(capsys, "distill", config)
    assert "train.jsonl" in text
    assert "messages" in text


def test_a_config_of_another_command_names_it(tmp_path, capsys):
    config = write_distill_run(tmp_path / "distill", sft={"loss_on": "last"})
    text = refused(capsys, "grpo", config)
    assert "it is a config for `rlsys distill`" in text
    assert "distill: there is no such field. It is for `rlsys distill`" in refused(
        capsys, "sft", config
    )
    for write, command in ((write_run, "grpo"), (write_sft_run, "sft")):
        folder = tmp_path / command
        folder.mkdir()
        sections = {"sft": {"loss_on": "last"}} if command == "sft" else {}
        other = write(folder, **sections)
        text = refused(capsys, "distill", other)
        assert f"rlsys {command}" in text


def test_a_config_that_could_run_is_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = write_distill_run(tmp_path, distill={"beta": 0.0, "loss_top_k": 5})
    assert cli.main(["explain", str(config)]) == cli.DONE
    text = " ".join(capsys.readouterr().out.split())
    assert "distillation (GKD)" in text
    assert "forward KL, KL(teacher || student) (distill.beta 0)" in text
    assert "the teacher's 5 likeliest tokens and the rest" in text
    assert "teacher 0" in text or "teacher x 1" in text
