"""Whole runs of `rlsys preference`: held-out pairs are told apart, by the saved model too."""

import json

import pytest
import torch
import yaml
from run_cases import RunProcess
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.files import read_jsonl

pytestmark = pytest.mark.system

STEPS = 40
GOOD, BAD = "{} plus {} makes {}.", "I do not know {} and {}, perhaps {}."


def write_files(folder, model, **sections):
    folder.mkdir(parents=True)
    for split, numbers in (("train", range(30)), ("validation", range(40, 52))):
        rows = [
            {
                "prompt": f"{n} + {n}?" * (1 + n % 3),
                "chosen": GOOD.format(n, n, 2 * n),
                "rejected": BAD.format(n, n, n),
            }
            for n in numbers
        ]
        labelled = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows
            for name in ("chosen", "rejected")
        ]
        for name, written in ((split, rows), (f"{split}-labels", labelled)):
            text = "".join(json.dumps(row) + "\n" for row in written)
            (folder / f"{name}.jsonl").write_text(text)
    config = {
        "output_dir": "out",
        "max_steps": STEPS,
        "eval_steps": 20,
        "seed": 1,
        "device": "cpu",
        "data": {
            "dataset": ["train.jsonl"],
            "val_dataset": ["validation.jsonl"],
            "max_length": 120,
        },
        "model": {"path": str(model)},
        "preference": {"loss_type": "sigmoid"},
        "policy": {"global_batch_size": 4, "max_tokens_per_micro_batch": 300, "lr": 1e-3},
        "tracking": {"report_to": "none"},
    }
    for name, fields in sections.items():
        config[name] = {**config.get(name, {}), **fields}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def start(folder, *words):
    return RunProcess(folder, "run.yaml", *words, subcommand="preference")


@pytest.fixture(scope="module")
def run(starter_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference") / "run"
    write_files(folder, starter_model)
    run = start(folder)
    assert run.wait() == 0, run.log
    yield run
    run.end()


def metrics(run, name):
    """Step -> value."""
    return {row["step"]: row[name] for row in read_jsonl(run.out.metrics) if name in row}


@torch.no_grad()
def logps(folder, rows, name):
    """Log-prob of each answer by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        turns.append({"role": "assistant", "content": row[name]})
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        start = len(tokenizer(head, add_special_tokens=False).input_ids)
        ids = torch.tensor(ids[:end])
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(-1, ids[1:, None])[start - 1 :].sum().double())
    return torch.stack(found)


def test_held_out_pairs_are_told_apart_by_the_saved_model(run, starter_model):
    accuracies = metrics(run, "eval/rewards/accuracies")
    assert list(accuracies) == [0, 20, 40]
    assert accuracies[0] == 0  # the policy is the reference
    assert accuracies[STEPS] > 0.9
    rows = list(read_jsonl(run.folder / "validation.jsonl"))
    rewards = [
        0.1 * (logps(run.out.final, rows, name) - logps(starter_model, rows, name))
        for name in ("chosen", "rejected")
    ]
    margins = rewards[0] - rewards[1]
    assert metrics(run, "eval/rewards/margins")[STEPS] == pytest.approx(
        margins.mean().item(), abs=1e-4
    )
    assert metrics(run, "eval/loss")[STEPS] == pytest.approx(
        -logsigmoid(margins).mean().item(), abs=1e-5
    )
    assert list(metrics(run, "loss")) == list(range(1, STEPS + 1))
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert len(metrics(run, name)) == STEPS, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("precomputed", ["--preference.precompute_ref_log_probs", "true"]),
        ("on two ranks", ["--policy.world_size", "2"]),
        ("in small parts", ["--policy.max_tokens_per_micro_batch", "240"]),
    ],
)
def test_runs_that_differ_in_how_they_compute_are_alike(run, starter_model, tmp_path, name, words):
    write_files(tmp_path / "run", starter_model)
    other = start(tmp_path / "run", *words)
    assert other.wait() == 0, other.log
    for metric in ("loss", "rewards/margins", "eval/loss"):
        mine, its = metrics(run, metric), metrics(other, metric)
        assert mine.keys() == its.keys()
        assert list(its.values()) == pytest.approx(list(mine.values()), abs=2e-3), metric
    if name == "precomputed":
        assert "the log-probs of 42 rows are computed, and kept" in other.log
    other.end()


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_bits(run, starter_model, tmp_path):
    write_files(tmp_path / "stopped", starter_model, checkpoint={"save_steps": 5})
    stopped = start(tmp_path / "stopped")
    stopped.wait_for(lambda: stopped.out.metrics.exists() and len(metrics(stopped, "loss")) >= 8)
    stopped.interrupt()
    assert stopped.wait() != 0
    continued = start(tmp_path / "stopped", "--checkpoint.resume")
    assert continued.wait() == 0, continued.log
    for name in ("loss", "rewards/margins", "eval/loss", "num_tokens"):
        assert metrics(continued, name) == metrics(run, name), name
    weights = [load_file(r.out.final / "model.safetensors") for r in (run, continued)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    continued.end()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "policy"),
    [
        ({"loss_type": "sigmoid", "rpo_alpha": 0.2}, {"lora": {"rank": 8}, "lr": 1e-2}),
        ({"loss_type": "simpo"}, {"lr": 3e-4}),
        ({"loss_type": "orpo"}, {}),
        ({"loss_type": "kto"}, {}),
    ],
    ids=["LoRA", "SimPO", "ORPO", "KTO"],
)
def test_other_losses_learn(starter_model, tmp_path, section, policy):
    is_kto = section["loss_type"] == "kto"
    data = {"dataset": ["train-labels.jsonl"], "val_dataset": ["validation-labels.jsonl"]}
    folder = tmp_path / "run"
    options = {"data": data} if is_kto else {}
    write_files(folder, starter_model, preference=section, policy=policy, **options)
    run = start(folder)
    assert run.wait() == 0, run.log
    margins = metrics(run, "eval/rewards/margins")
    assert margins[STEPS] > margins[0] + 0.1
    if is_kto:
        assert min(metrics(run, "kl").values()) >= 0
        assert metrics(run, "eval/rewards/chosen")[STEPS] > 0
    else:
        assert metrics(run, "eval/rewards/accuracies")[STEPS] > 0.9
    run.end()
