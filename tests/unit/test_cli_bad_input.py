"""Mistakes of users: one message before anything starts.

Every case runs through `rlsys grpo`, all of them in one process of their own, in which nothing else
has imported Ray.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from config_cases import write_run

HEAVY = ("torch", "ray", "vllm", "megatron", "transformers", "datasets")

RUNNER = """
import contextlib, io, json, sys
from rlsys import cli

cases, heavy = json.load(sys.stdin)
results = {}
for name, words in cases.items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["grpo", *words])
    imported = [module for module in heavy if module in sys.modules]
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": imported}
json.dump(results, sys.stdout)
"""

PLUGIN = '''
"""A plugin of somebody who forgot a package."""
import nothing_of_this_name
'''

CASES = {
    "a file that is not there": ["nowhere.yaml"],
    "a folder": ["used"],
    "a file in Latin-1": ["latin-1.yaml"],
    "a missing model folder": ["run.yaml", "--model.path", "./nowhere"],
    "a dataset without messages": ["run.yaml", "--data.dataset", "questions.jsonl"],
    "a dataset that is not there": ["run.yaml", "--data.dataset", "nowhere.jsonl"],
    "an unknown reward": ["run.yaml", "--reward.reward_funcs", "countdwn"],
    "a plugin that raises": ["run.yaml", "--reward.external_plugins", "plugin.py"],
    "groups of one": ["run.yaml", "--rollout.num_generations", "1"],
    "more tokens than positions": ["run.yaml", "--rollout.max_completion_length", "1000"],
    "another run in the folder": ["run.yaml", "--output_dir", "used", "--policy.lr", "1e-5"],
    "nothing to resume": ["run.yaml", "--checkpoint.resume"],
    "a misspelt field": ["run.yaml", "--polcy.lr", "1e-5"],
}

SAYS = {
    "a file that is not there": ["nowhere.yaml", "there is no such file"],
    "a folder": ["used", "it is a folder; name a YAML file"],
    "a file in Latin-1": ["latin-1.yaml", "line 1 is not a text in UTF-8: byte 13 is 0xe9"],
    "a missing model folder": ["model.path", "there is no model folder './nowhere'"],
    "a dataset without messages": [
        "questions.jsonl",
        "columns messages",
        "has the columns: question",
    ],
    "a dataset that is not there": ["data.dataset", "'nowhere.jsonl'", "Relative paths start at"],
    "an unknown reward": ["'countdwn'", "Did you mean 'countdown'?", "Known: accuracy, "],
    "a plugin that raises": ["plugin.py", "line 3", "import nothing_of_this_name"],
    "groups of one": ["rollout.num_generations = 1 (command line)", "greater than or equal to 2"],
    "more tokens than positions": [
        "64 + ",
        "1000 = 1064 tokens",
        "256: make that 256 or fewer",
    ],
    "another run in the folder": [
        *("used", "holds another run", "--checkpoint.resume"),
        "  rlsys grpo run.yaml --policy.lr 1e-5 --output_dir used-2\n",
    ],
    "nothing to resume": ["no checkpoint to continue from", "leave checkpoint.resume out"],
    "a misspelt field": ["--polcy.lr", "Did you mean 'policy.lr'?"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad-input")
    write_run(folder)
    (folder / "questions.jsonl").write_text('{"question": "1 + 1?"}\n' * 20)
    (folder / "latin-1.yaml").write_bytes(b"output_dir: \xe9t\xe9\n")
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "used" / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "used" / "metrics.jsonl").write_text('{"step": 1}\n')
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps([CASES, HEAVY]),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_one_message_says_what_is_wrong_before_anything_is_started(results, case):
    result = results[case]
    assert (result["code"], result["out"], result["heavy"]) == (2, "", [])
    heading, *problems = result["err"].splitlines()
    assert heading.endswith("has 1 problem:")
    assert problems[0].startswith("  - ")
    if problems[1:2] == ["In another folder:"]:
        problems = problems[:1]
    assert all(line.startswith("    ") for line in problems[1:])  # of the same problem
    for words in SAYS[case]:
        assert words in result["err"]


def test_only_the_users_own_code_has_a_traceback(results):
    for case, result in results.items():
        assert ("Traceback" in result["err"]) == (case == "a plugin that raises")
    assert "rlsys/" not in results["a plugin that raises"]["err"]
