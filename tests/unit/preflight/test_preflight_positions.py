"""Lengths that are the config's defaults, for models with fewer positions."""

import pytest
from config_cases import write_model, write_run, write_sft_run

from rlsys.commands.grpo import checked
from rlsys.config import Config, SftConfig
from rlsys.config.load import load_config_as
from rlsys.preflight.checks import check_run
from rlsys.preflight.positions import within_positions
from rlsys.preflight.sft import check_sft_run
from rlsys.problems import ProblemsError


@pytest.fixture
def run(tmp_path):
    """A config without data.max_length, for a model of 256 positions."""
    path = write_sft_run(tmp_path)
    lines = [line for line in path.read_text().splitlines() if "max_length" not in line]
    path.write_text("\n".join(lines))
    return path


def length(path, *overrides):
    resolved = within_positions(load_config_as(SftConfig, path, overrides))
    return resolved.config.data.max_length, resolved.origins["data.max_length"]


def test_the_default_is_at_most_the_models_positions(run, tmp_path, capsys):
    resolved = checked(SftConfig, check_sft_run, str(run), [])
    assert resolved.config.data.max_length == 256
    text = capsys.readouterr().out
    assert f"data.max_length is 256, the positions of {tmp_path / 'model'}, and not" in text
    assert "its default of 2,048" in text
    assert length(run) == (256, "model")


def test_what_a_user_wrote_stays_and_is_refused_where_it_cannot_be(run, tmp_path):
    assert length(run, "--data.max_length", "64") == (64, "command line")
    with pytest.raises(ProblemsError, match=r"data\.max_length = 300 tokens, but .* for 256"):
        checked(SftConfig, check_sft_run, str(run), ["--data.max_length", "300"])


def test_a_model_with_more_positions_or_none_changes_nothing(run, tmp_path):
    write_model(tmp_path / "model", max_position_embeddings=4096)
    assert length(run) == (2048, "default")
    assert length(run, "--model.path", "./nowhere") == (2048, "default")


def test_errors_say_which_lengths_are_defaults(tmp_path):
    path = write_run(tmp_path)
    lines = [line for line in path.read_text().splitlines() if "max_prompt_length" not in line]
    path.write_text("\n".join(lines))
    whole = (
        r"data\.max_prompt_length 512 \(the default\) \+ rollout\.max_completion_length 64 = 576"
    )
    with pytest.raises(ProblemsError, match=f"{whole} tokens, but .* for 256"):
        checked(Config, check_run, str(path), [])
    few = ["--policy.max_tokens_per_micro_batch", "100"]
    with pytest.raises(ProblemsError, match=f"does not hold the longest row, {whole} tokens"):
        checked(Config, check_run, str(path), few)


def test_a_default_that_does_not_fit_micro_batches_is_named_as_one(run):
    few = ["--policy.max_tokens_per_micro_batch", "100"]
    with pytest.raises(ProblemsError, match=r"data\.max_length = 2048 \(the default\): use"):
        checked(SftConfig, check_sft_run, str(run), few)
