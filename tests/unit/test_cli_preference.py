"""`rlsys preference` on bad input: each is one clear error before Ray starts."""

import json
import sys

import pytest
from config_cases import write_preference_run, write_run, write_sft_run

from rlsys import cli

PAIR = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}


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
        ("--max_steps null", "max_steps: is missing, and so is num_train_epochs: set one of them"),
        ("--preference.loss_type dpo", "preference.loss_type = 'dpo' (command line): should be"),
        ("--preference.beta 0", "preference.beta"),
        ("--preference.label_smoothing 0.5", "preference.label_smoothing"),
        (
            "--preference.label_smoothing 0.1",
            "preference.label_smoothing = 0.1 is not read by preference.loss_type = sigmoid: leave",
        ),
        ("--preference.loss_type exo_pair", "takes the logarithm of preference.label_smoothing"),
        ("--preference.loss_type robust", "robust with preference.label_smoothing = 0 is sigmoid"),
        ("--preference.simpo_gamma 2", "simpo_gamma = 2.0 is not read by preference.loss_type"),
        (
            "--preference.loss_type orpo --preference.rpo_alpha 1",
            "preference.rpo_alpha = 1.0 is not read by preference.loss_type = orpo",
        ),
        (
            "--preference.f_alpha_divergence_coef 2",
            "is for preference.f_divergence_type = alpha_divergence, and that is reverse_kl",
        ),
        (
            "--preference.loss_type simpo --preference.f_divergence_type forward_kl",
            "f_divergence_type = forward_kl is not read by preference.loss_type = simpo",
        ),
        (
            "--preference.precompute_ref_log_probs true --data.streaming true",
            "preference.precompute_ref_log_probs needs all rows at once",
        ),
        (
            "--preference.reference_free true --reference.path other",
            "reference.path = other changes nothing, since preference.reference_free is true",
        ),
        (
            "--preference.loss_type cpo --reference.world_size 2",
            "reference.world_size = 2 changes nothing, since preference.loss_type = cpo knows no",
        ),
        (
            "--preference.loss_type simpo --reference.placement own",
            "reference.placement = own changes nothing, since preference.loss_type = simpo",
        ),
        (
            "--policy.lora.rank 4 --reference.placement own",
            "reference.placement = own changes nothing, since the reference is the policy with its",
        ),
        (
            "--policy.lora.rank 4 --reference.mixup_alpha 0.5",
            "reference.mixup_alpha = 0.5 changes nothing, since the reference is the policy with",
        ),
        ("--reference.sync_steps 5", "which `rlsys preference` does not do: leave it out"),
        ("--reference.mixup_alpha 0.5", "weights, which `rlsys preference` does not make: leave"),
        (
            "--reference.world_size 8 --reference.placement own",
            "reference.world_size = 8 makes 8 replicas, and a step has 4 rows for them (policy.",
        ),
        ("--reference.world_size 2", "reference.world_size = 2 is more than the policy's ranks"),
        ("--reference.path /nowhere", "reference.path: "),
        ("--data.prompt_template {prompt}", "`rlsys preference` does not read it: leave it out"),
        (
            "--policy.max_tokens_per_micro_batch 100",
            "does not hold the two answers of a pair, 2 x data.max_length 64 = 128 tokens: use 128",
        ),
        ("--policy.world_size 3", "policy.global_batch_size = 4 cannot be shared equally among 3"),
        ("--policy.global_batch_size 30", "has 20 rows to train on, and a step takes 30"),
        ("--rollout.num_engines 2", "--rollout.num_engines: there is no such field. It is for"),
        ("--model.path /nowhere", "model.path: "),
        ("--data.dataset /nowhere.jsonl", "data.dataset: "),
    ],
)
def test_words_that_do_not_fit(tmp_path, capsys, words, says):
    text = refused(capsys, "preference", write_preference_run(tmp_path), *words.split())
    path = tmp_path / "preference.yaml"
    assert text.startswith(f"rlsys preference: {path} has 1 problem: - ")
    assert says in text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (PAIR | {"rejected": "2"}, "train.jsonl, line 3: the chosen and the rejected answer are"),
        ({"prompt": "1?", "chosen": "2"}, "train.jsonl, line 3: has no pair of answers: a row"),
        (PAIR | {"chosen": 2}, "train.jsonl, line 3: the column 'chosen' is not a text: 2"),
    ],
)
def test_rows_that_prefer_nothing(tmp_path, capsys, row, says):
    path = write_preference_run(tmp_path)
    rows = [PAIR, PAIR, row, *[PAIR] * 10]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refused(capsys, "preference", path)
    assert text.startswith(f"rlsys preference: {path} has 1 problem: - data.dataset: ")
    assert says in text


def test_labels_that_are_no_booleans(tmp_path, capsys):
    path = write_preference_run(tmp_path, preference={"loss_type": "kto"})
    good = {"prompt": "1 + 1?", "completion": "2", "label": True}
    rows = [good, good | {"label": "yes"}, *[good] * 10]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refused(capsys, "preference", path)
    assert "train.jsonl, line 2: the column 'label' is 'yes': true (desirable) or false" in text


def test_data_of_the_other_kind(tmp_path, capsys):
    path = write_preference_run(tmp_path, preference={"loss_type": "kto"})
    text = refused(capsys, "preference", path)
    assert "has no labels: with preference.loss_type kto a row needs `prompt`, `completion`" in text
    assert "Pairs of answers are for preference.loss_type sigmoid and others" in text


def test_a_config_for_another_command_names_it(tmp_path, capsys):
    text = refused(capsys, "preference", write_sft_run(tmp_path, sft={}))
    assert "it is a config for `rlsys sft`, with the section sft, and one for `rlsys pref" in text
    text = refused(capsys, "preference", write_run(tmp_path))
    assert "it is a config for `rlsys grpo`, with the section reward" in text
    text = refused(capsys, "sft", write_preference_run(tmp_path))
    assert "it is a config for `rlsys preference`, with the section preference" in text
    path = write_preference_run(tmp_path, preference=None, reference={"world_size": 1})
    text = refused(capsys, "explain", path)  # GRPO has a reference, too
    assert f"and may be for another command: rlsys preference {path}" in text


def test_the_help_is_about_preference(capsys):
    with pytest.raises(SystemExit):
        cli.main(["preference", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: rlsys preference CONFIG" in text
    assert "--preference.loss_type ipo" in text
