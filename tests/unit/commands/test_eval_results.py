"""Results of evaluations: files, tables, and what is not compared."""

import io
import json

import numpy as np
import pytest
from config_cases import values
from rich.console import Console
from safetensors.numpy import save_file

from rlsys import cli
from rlsys.commands.eval_results import (
    compare_results,
    print_comparison,
    print_results,
    read_result,
    result_folders,
    write_result,
)
from rlsys.config import Config
from rlsys.problems import ProblemsError
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup


def config(**sections):
    return Config.model_validate(values(reward={"reward_funcs": ["accuracy"]}) | sections)


def groups(rewards, question="?"):
    """Two completions for each prompt, with these rewards."""
    found = []
    for number, pair in enumerate(rewards):
        prompt = Prompt(f"p{number}", [{"role": "user", "content": question}], [1])
        completions = [Completion([5, 6], [0.0, 0.0], "x", "length", (0,)) for _ in pair]
        scored = [RewardOutput(2 * value, {"accuracy": value}) for value in pair]
        found.append(RolloutGroup(number, prompt, completions, scored, number))
    return found


@pytest.fixture
def write(tmp_path):
    def write(name, rewards, question="?", **sections):
        folder = tmp_path / name
        folder.mkdir()
        own = config(**{"eval": {"num_generations": 2}} | sections)
        return write_result(folder, own, name, {"": groups(rewards, question)}, seconds=1.0)

    return write


WORSE, BETTER = [(0.0, 0.0), (0.0, 1.0)] * 20, [(1.0, 1.0), (0.0, 1.0)] * 20


def text_of(show, *arguments):
    console = Console(width=140, record=True, file=io.StringIO())
    show(*arguments, console)
    return console.export_text()


def test_a_result_is_read_as_it_was_written(write, tmp_path):
    result = write("one", WORSE)
    assert read_result(tmp_path / "one") == result
    assert result.scores[""]["pass@1"]["mean"] == 0.25
    assert result.scores[""]["pass@2"]["mean"] == 0.5
    assert result.scores[""]["reward"]["mean"] == 0.5
    assert result.scores[""]["pass@2"]["num_prompts"] == 40
    assert (result.num_completions, result.num_cut) == (80, 80)


def test_the_table_has_a_column_for_each_model(write):
    text = text_of(print_results, [write("one", WORSE), write("two", BETTER)])
    assert "one" in text.splitlines()[0]
    assert "two" in text.splitlines()[0]
    [line] = [line for line in text.splitlines() if "pass@2" in line]
    assert line.split() == ["pass@2", "0.500", "±", "0.080", "1.000", "±", "0.000"]
    assert "80 of 80" in text
    assert "correct: accuracy >= 1" in text


def test_a_difference_is_more_than_noise_or_is_not(write):
    one, two, three = write("one", WORSE), write("two", BETTER), write("three", WORSE[::-1])
    differences = compare_results(one, two)
    assert differences[""]["pass@1"].mean == pytest.approx(0.5)
    text = text_of(print_comparison, differences, one, two)
    assert text.count("more than noise") == 4
    assert "within noise" in text_of(print_comparison, compare_results(one, three), one, three)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"question": "!"}, ["data.held-out.sha256"]),
        ({"rewards": WORSE[:-1]}, ["data.held-out.prompts differs: 40 and 39"]),
        ({"eval": {"num_generations": 2, "temperature": 0.5}}, ["sampling.temperature differs"]),
        (
            {"eval": {"num_generations": 2, "top_p": 0.5, "correct": "accuracy >= 0.5"}},
            ["sampling.top_p differs: 1.0 and 0.5", "correct differs"],
        ),
        (
            {"reward": {"reward_funcs": ["accuracy"], "reward_params": {"accuracy": {"x": 1}}}},
            ["rewards.reward_params.accuracy differs"],
        ),
    ],
)
def test_what_differs_is_not_compared(write, other, named):
    first = write("one", WORSE)
    second = write("two", **{"rewards": WORSE} | other)
    with pytest.raises(ProblemsError) as caught:
        compare_results(first, second)
    for text in named:
        assert text in str(caught.value)


def test_missing_values_stay_missing(write, tmp_path):
    write("one", [(float("nan"), 1.0), (float("nan"), float("nan"))])
    values = read_result(tmp_path / "one").prompts[""]
    assert values["pass@2"] == [None, None]
    assert values["pass@1"] == [1.0, None]
    difference = compare_results(read_result(tmp_path / "one"), read_result(tmp_path / "one"))
    assert difference[""]["pass@1"].num_prompts == 1


def test_folders_are_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = ["runs/a step 20", "Qwen/Qwen3", "runs/a step 20"]
    names = ["runs-a-step-20", "Qwen-Qwen3", "runs-a-step-20-2"]
    assert [str(f) for f in result_folders(None, config(), labels)] == [f"evals/{n}" for n in names]
    (tmp_path / "evals/Qwen-Qwen3").mkdir(parents=True)
    assert str(result_folders(None, config(), ["Qwen/Qwen3"])[0]) == "evals/Qwen-Qwen3-2"
    out = tmp_path / "out"
    assert result_folders(out, config(), ["one"]) == [out]
    assert result_folders(out, config(), ["one", "two"]) == [out / "one", out / "two"]
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        result_folders(out, config(), ["one"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a model or a run"),
        (["c.yaml"], "name a model or a run"),
        (["--compare", "x", "y", "z"], "--compare takes two evaluations, and nothing else: z"),
        (["--compare", "x", "y"], "is not the folder of a finished evaluation"),
        (["./m", "c.yaml", "d.yaml"], "one CONFIG, please: c.yaml, d.yaml"),
        (["./m", "./m", "c.yaml"], "./m is named twice"),
        (["./m", "c.yaml"], "there is no folder ./m on this machine"),
        (["--server", "http://h", "m"], "--server needs CONFIG"),
        (["--server", "http://h", "m", "n", "c.yaml"], "takes one name"),
        (["m", "c.yaml", "--server", "http://h", "--step", "3"], "no --step"),
    ],
)
def test_what_is_refused(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_config_without_held_out_data_is_refused(capsys, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    (model / "tokenizer.json").touch()
    save_file({"weight": np.zeros(2, np.float32)}, model / "model.safetensors")
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(values()))
    words = ["eval", "--step", "3", str(model), str(file)]
    assert cli.main(words) == 2
    assert "--step 3 is for a run" in capsys.readouterr().err
    assert cli.main(["eval", str(model)]) == 2
    assert "CONFIG is missing" in capsys.readouterr().err
    assert cli.main(["eval", str(model), str(file), "--out", str(tmp_path / "o")]) == 2
    assert "there is nothing to evaluate on" in capsys.readouterr().err
