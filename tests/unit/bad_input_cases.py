"""Mistakes of users: the files that they are in, the words that name them, and what is said."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config_cases import hf_shapes, write_model, write_run, write_weights
from data_cases import word_tokenizer

PLUGIN = '"""A plugin of somebody who forgot a package."""\n\nimport nothing_of_this_name\n'
REGISTER = "from rlsys.rewards import register_reward\n"
ROW = {"messages": [{"role": "user", "content": "a b"}], "nums": [1, 1], "target": 2}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


@dataclass(frozen=True)
class Case:
    """Words behind `rlsys grpo`, and what the one message says."""

    words: list[str]
    says: list[str]
    is_late: bool = False
    """Whether it is found only when all rows are read, for which torch and Ray are imported."""
    has_traceback: bool = False
    """Whether it shows the traceback of the user's own code."""
    env: tuple[str, str] | None = None


class Cases(dict[str, Case]):
    """Cases by name; each method adds one, with its files in `folder`."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def config(self, name: str, text: str | bytes, *says: str) -> None:
        """A config file with this text."""
        path = self.folder / f"{name.replace(' ', '_')}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        self[f"config: {name}"] = Case([path.name], [path.name, *says])

    def words(self, name: str, words: str, *says: str, **options: Any) -> None:
        """A good config with these words behind it."""
        self[name] = Case(["run.yaml", *words.split()], list(says), **options)

    def model(
        self, name: str, change: Callable[[Path], object] | None, *says: str, **sizes: Any
    ) -> None:
        """A model folder with a change, or with other sizes."""
        folder = write_model(self.folder / f"model-{name.replace(' ', '-')}", **sizes)
        if change is not None:
            change(folder)
        self.words(f"model: {name}", f"--model.path ./{folder.name}", "model.path: ", *says)

    def plugin(self, name: str, text: str, *says: str, traceback: bool = False) -> None:
        """A plugin; one that begins with "mine" is asked for a reward function of that name."""
        path = self.folder / f"{name.replace(' ', '_')}.py"
        path.write_text(text)
        words = f"--reward.external_plugins {path.name}"
        words += " --reward.reward_funcs mine" if text.startswith("mine") else ""
        self.words(f"plugin: {name}", words, *says, has_traceback=traceback)

    def rows(
        self,
        name: str,
        content: bytes | str | dict[str, Any],
        *says: str,
        suffix: str = ".jsonl",
        **options: Any,
    ) -> None:
        """A file of rows; a dict or a text of JSON is a row after 19 good ones."""
        path = self.folder / f"rows-{name.replace(' ', '-')}{suffix}"
        if isinstance(content, dict) or (isinstance(content, str) and content[:1] in "{["):
            row = content if isinstance(content, str) else json.dumps(content)
            content = f"{json.dumps(ROW)}\n" * 19 + row
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        self.words(f"rows: {name}", f"--data.dataset {path.name}", *says, **options)


def write_cases(folder: Path) -> Cases:
    """All cases, with their files in a folder."""
    write_run(folder)
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "used" / "checkpoints" / "step-1").mkdir(parents=True)
    (folder / "used" / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "damaged" / "checkpoints" / "step-3").mkdir(parents=True)
    (folder / "damaged/checkpoints/step-3/manifest.json").write_text('{"files"')
    (folder / "damaged" / "metrics.jsonl").write_text('{"step": 3}\n')
    (folder / "a-file").write_text("")
    cases = Cases(folder)
    for add in (_configs, _words, _models, _plugins, _rows, _places):
        add(cases)
    return cases


def _configs(cases: Cases) -> None:
    good = (cases.folder / "run.yaml").read_text()
    cases["config: a file that is not there"] = Case(["nowhere.yaml"], ["there is no such file"])
    cases["config: a folder"] = Case(["used"], ["it is a folder; name a YAML file"])
    latin = b"output_dir: \xe9t\xe9\n"
    cases.config("latin", latin, "line 1 is not a text in UTF-8: byte 13 is 0xe9")
    cases.config("empty", "", "it should hold `section:` blocks of `field: value` lines")
    cases.config("a list", "- a\n", "it should hold `section:` blocks")
    cases.config("tab", "policy:\n\tlr: 1\n", "line 2, column 1", "found character '\\t'")
    cases.config("zero byte", "a: \0\n", "it is not valid YAML")
    cases.config("open", good + "policy: {lr: 1\n", "expected ',' or '}'")
    cases.config("two documents", f"{good}---\n{good}", "found another document")
    cases.config("number for a section", good + "policy: 3\n", "policy: should be a section")
    cases.config("twice", good + "max_steps: 3\n", "max_steps: is given twice, in lines 2 and")
    cases.config("in itself", "policy: &p {lr: *p}\n", "*p stands inside of &p")
    cases.config("deep", "a: " + "[" * 500, "it is nested more than 50 levels deep")
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    cases.config("bomb", "a0: &a0 [1]\n" + bomb, "it has more than 100,000 values")
    code = good + "policy: !!python/object/apply:os.getcwd []\n"
    cases.config("code", code, "python/object/apply:os.getcwd")


def _words(cases: Cases) -> None:
    for name, words, *says in (
        ("a misspelt field", "--polcy.lr 1", "--polcy.lr", "Did you mean 'policy.lr'?"),
        ("a word for a number", "--policy.lr fast", "policy.lr = 'fast' (command line)"),
        ("a negative number", "--policy.lr -1", "greater than or equal to 0"),
        ("not a number", "--policy.lr .nan", "should be a finite number"),
        ("no steps", "--max_steps 0", "max_steps = 0", "greater than 0"),
        ("half a step", "--max_steps 2.5", "should be a valid integer"),
        ("two values", "--policy.lr 1 2", "takes one value, but has 2: 1 2"),
        ("no value", "--policy.lr", "--policy.lr: needs a value"),
        ("given twice", "--policy.lr 1 --policy.lr 2", "is given 2 times"),
        ("a section", "--policy 3", "is a section; set one of its fields"),
        ("a word for a bool", "--overwrite perhaps", "should be a valid boolean"),
        ("an unknown loss", "--grpo.loss_type grpp", "Did you mean 'grpo'?"),
        ("an unknown schedule", "--policy.lr_scheduler_type zigzag", "'constant', 'linear' or"),
        (
            "an unknown tracker",
            "--tracking.report_to nothing",
            "Known: mlflow, swanlab, tensorboard",
        ),
        ("an unknown reward", "--reward.reward_funcs countdwn", "Did you mean 'countdown'?"),
        ("a clip below zero", "--grpo.epsilon 2", "puts the lower clip bound at -1"),
        ("groups of one", "--rollout.num_generations 1", "greater than or equal to 2"),
        ("uneven groups", "--rollout.generation_batch_size 18", "use 16 or 20"),
        ("uneven ranks", "--policy.world_size 3 --policy.tensor_parallel_size 2", "use 2 or 4"),
        ("weights of rewards", "--reward.reward_weights 1", "1 value for 2 reward functions"),
        ("half a mapping", "--reward.reward_params {a:", "should be a valid dictionary"),
        ("nothing held out", "--eval_steps 5", "there is nothing to evaluate on"),
        ("too many tokens", "--rollout.max_completion_length 1000", "make that 256 or fewer"),
        ("a negative heartbeat", "--rollout.heartbeat_s -1", "rollout.heartbeat_s = -1"),
    ):
        cases.words(f"words: {name}", words, *says)


def _models(cases: Cases) -> None:
    weights = "model.safetensors"

    def writes(name: str, content: bytes | str) -> Callable[[Path], object]:
        data = content if isinstance(content, bytes) else content.encode()
        return lambda folder: (folder / name).write_bytes(data)

    def removes(name: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).unlink()

    def only_pickles(folder: Path) -> None:
        (folder / weights).rename(folder / "pytorch_model.bin")

    cases.words("model: nowhere", "--model.path ./nowhere", "there is no model folder './nowhere'")
    cases.model("without config", removes("config.json"), "holds no config.json")
    cases.model("half a config", writes("config.json", '{"a": '), "is not valid JSON")
    cases.model("a list", writes("config.json", "[]"), "is not a JSON object")
    cases.model("a pointer", writes(weights, LFS), "is a pointer of Git LFS", "git lfs pull")
    cases.model("cut off", lambda folder: os.truncate(folder / weights, 5000), "is cut off")
    cases.model("noise", writes(weights, b"\xff" * 400), "is not a safetensors file")
    cases.model("without weights", removes(weights), "holds no .safetensors file")
    cases.model("pickles", only_pickles, "pytorch_model.bin", "can run code")
    cases.model("without tokenizer", removes("tokenizer.json"), "holds no tokenizer.json")
    shapes = {"model.embed_tokens.weight": (2, 2)}
    other = lambda folder: write_weights(folder / weights, hf_shapes(folder) | shapes)  # noqa: E731
    cases.model("other shapes", other, "has shape [2, 2], by config.json it is [384, 64]")
    for name, says, sizes in (
        ("uneven heads", "num_key_value_heads = 4 does not divide", {"num_attention_heads": 7}),
        ("no size", "hidden_size = 0 should be a whole number", {"hidden_size": 0}),
        ("endless layers", "a whole number up to 10,000", {"num_hidden_layers": 10**12}),
        ("another kind", "model_type 't5' is not supported", {"model_type": "t5"}),
        ("another function", "hidden_act = 'gelu' is not supported", {"hidden_act": "gelu"}),
        ("an unknown key", "new_thing = 3 is not known", {"new_thing": 3}),
        ("its own code", "the model brings code of its own", {"auto_map": {"AutoModel": "m.M"}}),
        ("quantized", "are stored as gptq", {"quantization_config": {"quant_method": "gptq"}}),
    ):
        cases.model(name, None, says, **sizes)


def _plugins(cases: Cases) -> None:
    cases.words(
        "plugin: nowhere", "--reward.external_plugins nowhere.py", "nowhere.py' is not a file"
    )
    lines = ["line 3", "import nothing_of_this_name"]
    cases.plugin("a missing package", PLUGIN, *lines, traceback=True)
    cases.plugin("syntax", "def (:\n", "syntax.py", "line 1", "SyntaxError")
    cases.plugin("bytes", "\0\0", "bytes.py", "SyntaxError")
    cases.plugin("an exit", "import sys\n\nsys.exit(0)\n", "an_exit.py", traceback=True)
    cases.plugin("registers nothing", "mine = 1\n", "unknown reward function 'mine'")
    three = REGISTER + "register_reward('mine')(3)\n"
    cases.plugin("registers a number", three, "'mine' is 3, not a function", traceback=True)


def _rows(cases: Cases) -> None:
    def says(content: Any) -> dict[str, Any]:
        return ROW | {"messages": [{"role": "user", "content": content}]}

    cases.words("rows: nowhere", "--data.dataset nowhere.jsonl", "'nowhere.jsonl' does not exist")
    cases.words("rows: a count", "--data.dataset train.jsonl#x", "a number of rows belongs behind")
    cases.words(
        "rows: twice", "--data.dataset train.jsonl train.jsonl", "a dataset is listed twice"
    )
    cases.rows("suffix", b"{}", "must be a file in .jsonl, .json", suffix=".txt")
    cases.rows("empty", b"", "has no rows")
    cases.rows("a page", "<!DOCTYPE html>\n" * 20, "is a web page, not rows")
    cases.rows("a pointer", LFS * 20, "is a pointer of Git LFS")
    cases.rows("columns", b'{"question": "1?"}\n' * 20, "has the columns: question")
    cases.rows("half a row", '{"messages": ', "line 20: not JSON")
    cases.rows("a list", "[1]", "line 20: expected a JSON object, found [1]")
    cases.rows("not a number", '{"prompt": NaN}', "NaN is not a JSON value")
    cases.rows("a key twice", '{"a": 1, "a": 2}', "has the key 'a' twice")
    cases.rows("deep", "[" * 100_000, "nested too deeply")
    cases.rows("half a character", says("\ud83d"), "half of a surrogate pair")
    cases.rows("no words", says(""), "the user message has no text")
    cases.rows("a role", {"messages": [{"role": "wizard"}]}, "a message is {'role': one of system")
    cases.rows("a text of turns", {"messages": "hello"}, "is a text that is not JSON")
    cases.rows("a picture", ROW | {"images": ["a.png"]}, "rlsys trains on text alone")
    cases.rows("tools", ROW | {"tools": "x"}, "the column 'tools' is a text that is not JSON")
    cases.rows("variables", ROW | {"chat_template_kwargs": [1]}, "'chat_template_kwargs' should")
    cases.rows("too few", json.dumps(ROW).encode(), "needs 4 prompts")
    cases.rows(
        "cells", "prompt,a\n" + "b,c\n" * 20 + "b\n", "has 1 cells", suffix=".csv", is_late=True
    )
    cases.rows("semicolons", "a;b\n1;2\n", "the header has no comma", suffix=".csv")
    cases.rows("utf 16", "prompt,a\n".encode("utf-16"), "looks like UTF-16", suffix=".csv")
    cases.rows("a table", b"PAR1 nothing", "is not a Parquet file", suffix=".parquet")
    cut = gzip.compress((json.dumps(ROW) + "\n").encode() * 99)[:-20]
    cases.rows("cut off", cut, "cannot be decompressed", suffix=".jsonl.gz", is_late=True)
    cases.rows("values", ROW | {"nums": "many"}, "found 'many'", is_late=True)
    cases.words(
        "rows: too long", "--data.max_prompt_length 1", "every prompt of", "Raise it", is_late=True
    )


def _places(cases: Cases) -> None:
    for name, folder, *says in (
        ("a file", "a-file", "a-file is not a folder"),
        ("below a file", "a-file/run", "a-file is not a folder: choose another one"),
        ("a device", "/dev/null/run", "/dev/null is not a folder"),
        ("a long name", "x" * 300, "File name too long"),
        ("a model", "model", "holds a model (config.json)"),
    ):
        cases.words(f"disk: {name}", f"--output_dir {folder}", "output_dir: ", *says)
    cases.words(
        "disk: cannot be written",
        "--output_dir /proc/run",
        "/proc/run cannot be written to",
        is_late=True,
    )
    cases.words(
        "disk: another run",
        "--output_dir used --policy.lr 1e-5",
        *("used", "holds another run", "--checkpoint.resume"),
        "  rlsys grpo run.yaml --policy.lr 1e-5 --output_dir used-2\n",
    )
    resume = "--output_dir damaged --checkpoint.resume"
    cases.words("checkpoint: none", "--checkpoint.resume", "no checkpoint to continue from")
    cases.words("checkpoint: another step", f"{resume} 7", "no checkpoint of step 7, it has 3")
    cases.words("checkpoint: the best", f"{resume} best", "needs checkpoint.metric_for_best_model")
    cases.words("checkpoint: a word", f"{resume} newst", "or 'newest' or 'best'")
    cases.words("checkpoint: damaged", resume, "step 3: manifest.json cannot be read")
    nowhere = ("RAY_ADDRESS", "127.0.0.1:1")
    cases.words(
        "cluster: nobody answers", "", "no Ray cluster answers there", is_late=True, env=nowhere
    )
