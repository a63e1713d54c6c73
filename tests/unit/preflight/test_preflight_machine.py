"""Packages, kernels and GPUs that a run lacks on this machine."""

import pytest
from config_cases import write_model
from preflight_cases import only

from rlsys.tracking import mlflow, packages


@pytest.mark.parametrize(
    ("device", "built_for", "words"),
    [
        ("cuda", "cpu", ["on GPUs", "built for the CPU", "--device cpu"]),
        ("cpu", "cuda", ["on the CPU", "built for GPUs", "--device cuda"]),
    ],
)
def test_packages_of_the_other_device(problems, monkeypatch, device, built_for, words):
    monkeypatch.setattr("rlsys.preflight.machine.device_of_packages", lambda: built_for)
    found = problems(device=device)
    for word in words:
        assert word in only(found)
    assert problems(device=built_for) == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose hosts have their own packages
    assert problems(device=device) == []


@pytest.mark.parametrize(
    ("backend", "device", "variable", "words"),
    [
        ("fused", "cpu", None, ["attention_backend = fused", "one kind only", "set it to auto"]),
        ("flash", "cuda", None, ["attention_backend = flash", "pip install flash-attn"]),
        ("unfused", "cuda", "NVTE_FLASH_ATTN", ["NVTE_FLASH_ATTN=1", "unfused", "unset it"]),
    ],
)
def test_attention_that_does_not_exist(problems, monkeypatch, backend, device, variable, words):
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    found = problems(device=device, policy={"attention_backend": backend})
    for word in words:
        assert word in only(found)
    assert found[0].only_here == (device == "cuda")


@pytest.mark.parametrize(
    "policy", [{"attention_backend": "fused"}, {"world_size": 2, "context_parallel_size": 2}]
)
def test_attention_without_float32(problems, policy, tmp_path):
    model = {"path": str(write_model(tmp_path / "other")), "dtype": "float32"}
    found = problems(device="cuda", policy=policy, model=model)
    assert "no kernels for float32" in only(found)
    assert not found[0].only_here


def test_the_cluster_may_have_the_attention_of_gpus(problems, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert problems(device="auto", policy={"attention_backend": "fused"}) == []


@pytest.mark.parametrize(
    ("there_are", "overrides", "words"),
    [
        (
            1,
            ["--placement", "dedicated"],
            [
                "needs 2 GPUs (policy 1, rollout 1), and this machine shows 1",
                "set placement to colocated",
                "not: lower",
                "not: world_size",
            ],
        ),
        (
            3,
            ["--rollout.num_engines", "3"],
            [
                *("needs 4 GPUs (policy 1, rollout 3)", "shows 3", "lower rollout.num_engines"),
                *("raise rollout.engines_per_gpu", "not: lower policy.world_size"),
                "not: reference.placement",
            ],
        ),
        (
            2,
            ["--policy.world_size", "2", "--placement", "dedicated"],
            ["lower policy.world_size", "not: rollout.num_engines"],
        ),
        (
            2,
            ["--grpo.beta", "0.1", "--reference.placement", "own", "--placement", "dedicated"],
            ["shows 2: set reference.placement to policy, set placement to colocated"],
        ),
        (0, [], ["shows 0", "--device cpu"]),
    ],
)
def test_more_gpus_than_this_machine_has(problems, gpus, monkeypatch, there_are, overrides, words):
    gpus(there_are)
    found = problems("--device", "cuda", *overrides)
    for word in words:
        assert (word.removeprefix("not: ") in only(found)) != word.startswith("not: ")
    assert found[0].only_here
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose GPUs nobody sees from here
    assert problems("--device", "cuda", *overrides) == []


def test_a_tracker_that_nobody_registered(problems):
    text = only(problems("--tracking.report_to", "tensorbord"))
    assert "Did you mean 'tensorboard'?" in text


def test_trackers_that_are_not_installed_are_one_problem_with_the_command(problems, monkeypatch):
    monkeypatch.setattr(packages, "installed_version", {"mlflow-skinny": "2.9"}.get)
    found = problems("--tracking.report_to", "tensorboard", "wandb", "mlflow")
    text = only(found)
    assert 'pip install "wandb>=0.19" "mlflow>=3"' in text
    assert "wandb is not installed, mlflow is 2.9, too old" in text
    assert found[0].only_here


def test_mlflow_skinny_writes_to_servers_only(problems, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    skinny = {"mlflow-skinny": "3.17"}.get
    monkeypatch.setattr(packages, "installed_version", skinny)
    monkeypatch.setattr(mlflow, "installed_version", skinny)
    assert "pip install mlflow" in only(problems("--tracking.report_to", "mlflow"))
    server = ["--tracking.mlflow_tracking_uri", "http://127.0.0.1:5000"]
    assert problems("--tracking.report_to", "mlflow", *server) == []
