"""Score heads in the engine: transformers' scores, losses and gradients, however rows are cut."""

import json
import math

import pytest
import torch
from family_models import MODELS, save_family_model
from one_rank import one_rank
from peft import PeftModel
from policy_cases import LAYOUTS, PolicyLab
from scorer_cases import (
    NUM_LABELS,
    ScorerLabRank,
    loss_of_transformers,
    make_rows,
    open_classifier,
    scorer_config,
    scores_of_transformers,
)
from scorer_rank import scores_and_gradient, trained

from rlsys.algo.scores import build_score_batch, named
from rlsys.model.families import FAMILIES

pytestmark = pytest.mark.system

WITHOUT_CLASSIFIER = (
    *("qwen3_5_moe_text", "glm4_moe", "glm4_moe-qk-norm"),
    "phi3-longrope",  # whose frequencies depend on the batch in transformers: see preflight
)


@pytest.fixture(scope="module")
def rank():
    """A process that is a scorer of one rank."""
    with one_rank() as executor:
        yield lambda function, *args, **kwargs: executor.submit(function, *args, **kwargs).result()


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum() for tensor in tensors.values()))


def assert_gradient_of_transformers(found, folder, rows, problem_type):
    """The gradient is that of transformers in float64, with the same loss."""
    model = open_classifier(folder, torch.float64)
    loss = loss_of_transformers(model, rows, problem_type)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    assert norm(expected) > 0.1
    assert norm({name: found[name] - expected[name] for name in expected}) <= 1e-5 * norm(expected)
    return loss.item()


@pytest.mark.parametrize(
    ("name", "problem_type", "cut"),
    [
        ("qwen3-tied", "preference", {}),
        ("llama-untied", "preference", {"max_tokens_per_micro_batch": 80}),
        ("qwen2-tied", "single_label_classification", {"micro_batch_size": 1}),
        ("qwen3-untied", "multi_label_classification", {"max_tokens_per_micro_batch": 64}),
        ("llama-tied", "regression", {}),
    ],
    ids=str,
)
def test_scores_loss_and_gradient_are_those_of_transformers(
    rank, policy_models, tmp_path, name, problem_type, cut
):
    rows, folder = make_rows(problem_type), tmp_path / "saved"
    config = scorer_config(policy_models[name], problem_type, **cut)
    scores, gradient, metrics = rank(scores_and_gradient, config, rows, folder)
    model = open_classifier(folder)
    assert type(model).__name__ == FAMILIES[model.config.model_type].classifier
    assert model.config.num_labels == NUM_LABELS[problem_type]
    with torch.no_grad():
        expected = scores_of_transformers(model, rows)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    loss = assert_gradient_of_transformers(gradient, folder, rows, problem_type)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)


def test_a_padded_batch_of_transformers_has_the_same_scores(rank, policy_models, tmp_path):
    rows, folder = make_rows(), tmp_path / "saved"
    config = scorer_config(policy_models["qwen3-tied"])
    scores, _, _ = rank(scores_and_gradient, config, rows, folder)
    batch, model = build_score_batch(rows), open_classifier(folder)
    padded = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    ids = batch.input_ids.masked_fill(~padded, model.config.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=padded.long()).logits
    torch.testing.assert_close(scores, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("problem_type", ["preference", "single_label_classification"])
def test_loss_and_gradient_do_not_depend_on_micro_batches(
    rank, policy_models, tmp_path, problem_type
):
    rows, found = make_rows(problem_type), []
    cuts = ({"micro_batch_size": 8}, {"micro_batch_size": 1}, {"max_tokens_per_micro_batch": 90})
    for number, cut in enumerate(cuts):
        config = scorer_config(policy_models["qwen3-tied"], problem_type, **cut)
        found.append(rank(scores_and_gradient, config, rows, tmp_path / str(number)))
    (_, expected, metrics), *others = found
    for _, gradient, other_metrics in others:
        assert norm({n: gradient[n] - expected[n] for n in expected}) <= 1e-5 * norm(expected)
        assert other_metrics == pytest.approx(metrics, abs=1e-5)


def test_an_adapter_leaves_the_head_whole_and_is_merged(rank, policy_models, tmp_path):
    rows = make_rows()
    config = scorer_config(policy_models["qwen2-tied"], lr=1e-2, lora={"rank": 4})
    _, gradient, _ = rank(scores_and_gradient, config, rows, tmp_path / "base")
    assert gradient["base_model.model.score.weight"].abs().max() > 1e-3
    metrics = rank(trained, config, rows, tmp_path, steps=6, resume_after=3)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    checkpoint = tmp_path / "checkpoint"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    merged = open_classifier(tmp_path / "final")
    again = rank(trained, config, rows, tmp_path / "again", steps=6)
    assert again == metrics  # the checkpoint changes nothing
    # The checkpoint is what PEFT reads on the base with the run's own new head.
    with_adapter = PeftModel.from_pretrained(open_classifier(tmp_path / "base"), checkpoint)
    third = rank(trained, config, rows, tmp_path / "third", steps=3)
    assert third == metrics[:3]
    with torch.no_grad():
        expected = scores_of_transformers(open_classifier(tmp_path / "third/final"), rows)
        found = scores_of_transformers(with_adapter, rows)
        assert (scores_of_transformers(merged, rows) - expected).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_training_goes_on_from_a_checkpoint_and_from_a_reward_model(rank, policy_models, tmp_path):
    rows = make_rows()
    config = scorer_config(policy_models["qwen3-tied"], lr=1e-3)
    expected = rank(trained, config, rows, tmp_path / "whole", steps=4)
    found = rank(trained, config, rows, tmp_path / "parts", steps=4, resume_after=2)
    assert found == expected
    folder = tmp_path / "whole/final"
    scores, _, metrics = rank(
        scores_and_gradient, scorer_config(folder), rows, tmp_path / "taken over"
    )
    with torch.no_grad():
        of_folder = scores_of_transformers(open_classifier(folder), rows)
    torch.testing.assert_close(scores, of_folder, atol=1e-5, rtol=0)
    assert metrics["loss"] < expected[-1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITHOUT_CLASSIFIER])
def test_every_family_has_the_scores_of_transformers(rank, tmp_path, name):
    save_family_model(tmp_path / "model", name)
    rows = make_rows()
    config = scorer_config(tmp_path / "model")
    scores, _, _ = rank(scores_and_gradient, config, rows, tmp_path / "saved")
    model = open_classifier(tmp_path / "saved", attn_implementation="eager")
    with torch.no_grad():
        expected = scores_of_transformers(model, rows)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "problem_type"),
    [
        ("qwen3-tied", "TP 2", "preference"),
        ("qwen2-untied", "DP 2", "preference"),
        ("llama-untied", "PP 2", "single_label_classification"),
        ("llama-tied", "CP 2", "preference"),
        ("qwen3-tied", "TP 2 x DP 2", "multi_label_classification"),
    ],
    ids=str,
)
def test_layouts_have_the_gradient_of_transformers(
    ray_cluster, policy_models, tmp_path, name, layout, problem_type
):
    lab = PolicyLab(max_ranks=4, rank_class=ScorerLabRank)
    rows, folder = make_rows(problem_type), tmp_path / "saved"
    try:
        config = scorer_config(policy_models[name], problem_type, **LAYOUTS[layout])
        scorer = lab.policy(config)
        scorer.save_model(folder)
        batch = build_score_batch(rows)
        scores = torch.zeros(len(batch.lengths), NUM_LABELS[problem_type])
        for result in scorer.call("compute_scores", batch):
            if result is not None:
                scores[result[0]] = result[1]
        gradient = scorer.call("gradient", batch)[0]
        metrics = lab.policy(config).update(batch).metrics
    finally:
        lab.close()
    with torch.no_grad():
        expected = scores_of_transformers(open_classifier(folder), rows)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    loss = assert_gradient_of_transformers(gradient, folder, rows, problem_type)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert named(metrics, config.reward_model) == metrics
