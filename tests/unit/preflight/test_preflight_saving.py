"""What a run says that it saves: how often, and how much disk that takes."""

import json
import shutil
from collections import namedtuple

import pytest
from config_cases import write_config

from rlsys.config.load import load_config
from rlsys.model.memory import GIB
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.preflight import saving
from rlsys.preflight.saving import describe_saving, disk_use, disk_warning

Usage = namedtuple("Usage", ["total", "used", "free"])


class Shape(ModelShape):
    """Of so many parameters that one byte for each is a GiB."""

    num_params = GIB


@pytest.fixture
def config(tmp_path):
    def build(*overrides):
        options = ["--output_dir", str(tmp_path / "run"), *overrides]
        if "--max_steps" not in options:
            options += ["--max_steps", "100"]
        return load_config(write_config(tmp_path), options).config

    return build


def use(config, device="cuda"):
    return disk_use(config, Shape.__new__(Shape), device=device)


def test_bytes_of_a_checkpoint(config):
    """bfloat16: 2 for a weight; a copy in fp32 and two moments, 4 each."""
    of_gpu = use(config())
    assert (of_gpu.weights, of_gpu.optimizer, of_gpu.checkpoint) == (2 * GIB, 12 * GIB, 14 * GIB)
    assert use(config(), "cpu").checkpoint == (4 + 12) * GIB
    # megatron-core's plain optimizer of fp32 weights has no copy of them.
    plain = config("--policy.use_distributed_optimizer", "false")
    assert use(plain, "cpu").checkpoint == (4 + 8) * GIB


def test_a_folder_of_an_adapter_has_the_adapter_alone(config, tmp_path):
    hidden, ffn, layers, q, kv = 64, 96, 3, 4 * 16, 2 * 16
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3",
                "architectures": ["Qwen3ForCausalLM"],
                "vocab_size": 100,
                "hidden_size": hidden,
                "intermediate_size": ffn,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 256,
                "rms_norm_eps": 1e-6,
            }
        )
    )
    shape = read_model_shape(tmp_path)
    linears = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]
    linears += [(hidden, ffn), (hidden, ffn), (ffn, hidden)]
    adapter = 8 * layers * sum(map(sum, linears))
    use = disk_use(config("--policy.lora.rank", "8"), shape, device="cuda")
    assert (use.weights, use.optimizer) == (2 * adapter, 12 * adapter)
    use = disk_use(config("--policy.freeze_parameters_ratio", "0.5"), shape, device="cuda")
    assert use.weights == 2 * shape.num_params
    assert 0 < use.optimizer < 12 * shape.num_params


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([], 3),  # the newest two, and one that is being written
        (["--checkpoint.save_total_limit", "5"], 6),
        (["--max_steps", "2"], 2),
        (["--checkpoint.save_steps", "100"], 1),
        (["--checkpoint.save_steps", "null"], 0),
        (["--checkpoint.metric_for_best_model", "reward"], 4),
        (["--checkpoint.save_retain_interval", "25"], 7),
    ],
)
def test_all_checkpoints_and_the_final_model_are_counted(config, overrides, number):
    found = use(config(*overrides))
    assert found.total == number * 14 * GIB + 2 * GIB


def text(config):
    return "; ".join(f"{what} {how}" for what, how in describe_saving(config, use(config)))


def test_the_lines_say_how_often_where_and_how_much(config, tmp_path):
    found = text(config())
    assert "every 5 of 100 steps" in found
    assert f"in {tmp_path / 'run' / 'checkpoints'}" in found
    assert "on Ctrl-C or a failure" in found
    assert "44.0 GiB at most = 3 checkpoints x (weights 2.0 GiB + optimizer 12.0 GiB)" in found


@pytest.mark.parametrize(
    ("overrides", "number", "words"),
    [
        (["--checkpoint.save_hf_steps", "30"], 3, "every 30 steps"),
        (["--checkpoint.save_hf_steps", "1"], 100, "all kept"),
        (
            ["--checkpoint.save_hf_steps", "10", "--checkpoint.save_hf_total_limit", "4"],
            5,
            "only the newest 4 kept",
        ),
        (
            ["--checkpoint.save_hf_steps", "40", "--checkpoint.save_hf_total_limit", "4"],
            2,
            "without optimizer",
        ),
        (["--checkpoint.save_hf_steps", "101"], 0, "every 101 steps"),
    ],
)
def test_models_that_are_kept_are_said_and_counted(config, tmp_path, overrides, number, words):
    found, built = use(config(*overrides)), config(*overrides)
    assert found.num_models == number
    assert found.total == (3 * 14 + (number + 1) * 2) * GIB
    assert words in text(built)
    assert f"in {tmp_path / 'run' / 'hf'}" in text(built)
    assert (f"{number} folder" in text(built)) == (number > 0)


def test_an_interval_beyond_the_end_is_not_shown_as_one(config):
    found = text(config("--checkpoint.save_steps", "1000"))
    assert "after the last step only, of 100 (checkpoint.save_steps is 1,000)" in found
    assert "every" not in found


@pytest.mark.parametrize(("limit", "says"), [("1", "1 checkpoint kept"), ("2", "2 checkpoints")])
def test_what_is_kept_is_said_where_every_step_is_saved(config, limit, says):
    found = text(config("--max_steps", "5", "--checkpoint.save_total_limit", limit))
    assert "every step, or less often where saving takes more than a tenth of the time" in found
    assert f"only the newest {says}" in found


def test_what_is_kept_besides_the_newest_is_said(config):
    words = ["--checkpoint.metric_for_best_model", "eval_reward", "--eval_steps", "10"]
    words += ["--data.val_dataset", "x.jsonl", "--checkpoint.save_retain_interval", "25"]
    found = text(config(*words))
    assert "every 10 of 100 steps" in found
    assert "besides those of every 25 steps, besides the one with the largest eval/reward" in found


def test_null_is_said(config):
    found = text(config("--checkpoint.save_steps", "null"))
    assert "none, so nothing can be resumed (checkpoint.save_steps is null)" in found


@pytest.mark.parametrize(("free_gib", "warns"), [(43, True), (45, False)])
def test_a_disk_that_is_too_small_is_said_with_remedies(config, monkeypatch, free_gib, warns):
    usage = Usage(100 * GIB, 0, free_gib * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    warning = disk_warning(config(), use(config()))
    assert (warning is not None) == warns
    if warns:
        assert "43.0 GiB free, and the run may save 44.0 GiB" in warning
        assert "checkpoint.save_total_limit" in warning


@pytest.mark.parametrize("how", ["--checkpoint.resume", "--overwrite"])
def test_what_is_replaced_counts_as_room_and_what_is_moved_aside_does_not(
    config, monkeypatch, tmp_path, how
):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(saving, "bytes_in", lambda folder: 30 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(100 * GIB, 0, GIB))
    resumes = how == "--checkpoint.resume"
    assert (disk_warning(config(how), use(config(how))) is None) == resumes
