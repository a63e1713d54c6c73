"""`rlsys explain` of a config for supervised training."""

import io
import re

import pytest
from config_cases import EXPERTS, write_sft_run
from rich.console import Console

from rlsys.commands.explain import explain
from rlsys.commands.explain_sft import describe_training, sample_arithmetic
from rlsys.config import SftConfig
from rlsys.config.load import load_config_as
from rlsys.model.memory import estimate_policy
from rlsys.model.shape import read_model_shape


def load(path, *overrides):
    return load_config_as(SftConfig, path, overrides)


def printed(path, *overrides) -> tuple[bool, str]:
    text = io.StringIO()
    ok = explain(load(path, *overrides), Console(file=text, width=200))
    return ok, text.getvalue()


def test_a_run_is_explained_without_rollouts_rewards_or_advantages(tmp_path):
    path = write_sft_run(tmp_path)
    ok, text = printed(path)
    assert ok, text
    assert "Ready to run." in text
    for name in load(path).origins:
        assert re.search(rf"^ *{re.escape(name.rpartition('.')[2])} ", text, re.MULTILINE), name
    after_config = text.partition("\nTraining\n")[2]
    words = ("rollout", "reward", "completion", "vllm", "advantage", "reference", "sampling")
    assert not [word for word in words if word in after_config.lower()]


def test_memory_is_the_policys_estimate(tmp_path):
    path = write_sft_run(tmp_path)
    shape = read_model_shape(tmp_path / "model")
    estimate = estimate_policy(load(path).config, shape, device="cpu")
    text = printed(path)[1]
    assert "policy x 1" in text
    assert re.search(rf"sum +{estimate.total_gib:.2f}\n", text)


def test_adapters_and_what_is_trained_are_named(tmp_path):
    text = printed(write_sft_run(tmp_path, policy={"lora": {"rank": 4}}))[1]
    assert re.search(r"trained +trainable parameters: .* in 28 adapters of ", text), text
    assert not re.search(r"rollout engines  +", text)
    assert re.search(r"final adapter +in ", text), text
    assert "final model" not in text


def test_a_mixture_of_experts_has_no_replay(tmp_path):
    text = printed(write_sft_run(tmp_path, model=EXPERTS))[1]
    assert "2 of 8 for each token" in text
    assert "replay" not in text


@pytest.mark.parametrize(
    ("options", "name", "says"),
    [
        ("", "samples per step", "4 = policy.global_batch_size"),
        (
            "--policy.global_batch_size null --policy.micro_batch_size 2 --policy.world_size 2",
            "samples per step",
            "4 = policy.global_batch_size = policy.micro_batch_size x data-parallel ranks",
        ),
        ("--policy.micro_batch_size 3", "  in micro-batches", "2 of up to 3 samples, at most 192"),
        (
            "--policy.max_tokens_per_micro_batch 128",
            "  in micro-batches",
            "as many samples as fit, at most 128 tokens each",
        ),
        ("", "the whole run", "10 optimizer steps (1 of them warm-up): 40 samples, at most 2,560 "),
        ("", "epochs", "2.00 = 40 samples / 20 rows"),
        ("", "evaluations", "none: eval_steps is null"),
        (
            "--num_train_epochs 3",
            "num_train_epochs",
            "3 x 20 rows (less those over data.max_length) / samples per step 4 = 15 steps",
        ),
        ("--num_train_epochs 3", "epochs", "3.00 = 60 samples / 20 rows"),
        (
            "--num_train_epochs 3 --sft.objective pretrain",
            "num_train_epochs",
            "3 x pieces of texts, not counted yet / samples per step 4",
        ),
        ("--data.streaming true", "epochs", "2.00 = 40 samples / 20 rows"),
    ],
)
def test_the_batch_arithmetic(tmp_path, options, name, says):
    pairs = dict(sample_arithmetic(load(write_sft_run(tmp_path), *options.split()).config))
    assert pairs[name].startswith(says)


@pytest.mark.parametrize(
    ("options", "part", "says"),
    [
        ("", "trained on", "every answer"),
        ("--sft.loss_on last", "trained on", "the last answer of a row"),
        ("--sft.loss_on flag", "trained on", "answers whose message has `loss: true`"),
        ("--sft.thinking ignore", "thinking", "left out of the loss"),
        ("", "longer rows", "over data.max_length 64 tokens: dropped"),
        ("--sft.objective pretrain", "longer rows", "over data.max_length 64 tokens: cut into"),
        ("--sft.objective pretrain", "trained on", "every token of a text"),
        ("--data.streaming true", "order", "as streamed"),
        ("--data.shuffle false", "order", "as in the files"),
        (
            "--sft.group_by_length true",
            "order",
            "a new permutation in every epoch, by seed 42; sam",
        ),
        ("--policy.warmup_ratio 0 --policy.lr_scheduler_type constant", "learning rate", "1e-05"),
        ("", "learning rate", "from 0 to 1e-05 over 5% of the steps, then cosine from 1e-05 to 0"),
    ],
)
def test_what_is_learned_is_in_words(tmp_path, options, part, says):
    pairs = dict(describe_training(load(write_sft_run(tmp_path), *options.split()).config))
    assert pairs[part].startswith(says)
