"""Any input gives a result or a ValueError: never another exception, never a hang.

Each test draws a hundred examples, in CI the same ones in every run. A profile of hypothesis with
more `max_examples` looks longer.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random

import pytest
from config_cases import MODEL_SIZES, hf_shapes, write_model, write_run, write_sft_run
from data_cases import word_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from rlsys.commands.completions_follow import GroupReader
from rlsys.commands.completions_print import print_group
from rlsys.commands.rewards_try_rows import RowSources, group_rows, read_rows
from rlsys.config import Config, DataConfig, SftConfig, SftDataConfig
from rlsys.config.fields import config_fields
from rlsys.config.load import load_config_as, save_config
from rlsys.config.yaml_text import dump_yaml, load_yaml
from rlsys.data.load import load_prompts
from rlsys.data.samples import SampleRules, load_samples
from rlsys.model.folder_check import weight_problems
from rlsys.model.shape import read_model_shape
from rlsys.rewards.builtin.countdown import Countdown, is_solution, solve

pytestmark = pytest.mark.timeout(300)
fuzzed = settings(suppress_health_check=list(HealthCheck))
"""Files are written again for every example, so a fixture's folder may be shared."""

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**30, 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "null",
            "auto",
            "1e5",
            "-1",
            "",
            " ",
            "0x",
            "~",
            "[",
            "{",
            "a,b",
            "\ud83d",
            "\0",
            "9" * 5000,
        ]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def without_surprise(read, *arguments, **options):
    """The result, or the ValueError of what cannot be read; its text says something."""
    try:
        result = read(*arguments, **options)
    except ValueError as error:
        result = error
    assert not isinstance(result, UnicodeError), repr(result)  # Python's own, not a sentence
    assert not isinstance(result, ValueError) or str(result).strip(), repr(result)
    return result


def damaged(content: bytes, seed: int, times: int) -> bytes:
    """`content` with pieces deleted, doubled, exchanged or replaced."""
    drawing, result = random.Random(seed), bytearray(content)
    for _ in range(times):
        start = drawing.randrange(len(result) + 1)
        end = min(len(result), start + drawing.choice([1, 1, 2, 8, 40]))
        piece = result[start:end]
        other = drawing.randrange(len(result) + 1)
        match drawing.randrange(5):
            case 0:
                del result[start:end]
            case 1:
                result[start:start] = piece * drawing.choice([1, 3, 50])
            case 2:
                result[other:other] = piece
            case 3:
                signs = b"[]{}:,-&*!|>#%@`\"'\\\n\t\r 0x1e9\xff\x00\xed\xa0\x80"
                result[start:end] = bytes(drawing.choices(signs, k=drawing.choice([1, 2, 9])))
            case 4:
                result[start:end] = drawing.randbytes(len(piece))
    return bytes(result)


DAMAGE = st.integers(0, 2**32), st.integers(1, 8)


# --- configs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["grpo", "sft"])
def valid(request, tmp_path_factory):
    """The schema of a command, and a valid config for it in a folder of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "grpo":
        return Config, write_run(folder)
    return SftConfig, write_sft_run(folder)


def load(schema, folder, content: bytes, words=()):
    """What a file and words mean; a config that is accepted can be saved and read again."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(content)
    loaded = without_surprise(load_config_as, schema, path, words)
    if not isinstance(loaded, ValueError):
        save_config(loaded.config, folder / "saved.yaml")
        load_config_as(schema, folder / "saved.yaml")


@fuzzed
@given(
    content=st.binary(max_size=60)
    | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace"))
)
@example(b"[" * 5000)
@example(b"{a: " * 5000)
@example(b"a: &a [*a]")
@example(b"? [1]\n: 2")
@example(b"? {a: 1}\n: 2")
@example(b"&a {b: *a}")
@example(b"<<: [1]")
@example(b"<<: *x")
@example(b"policy: &p {<<: *p}")
@example(b"max_steps: 0x")
@example(b"max_steps: " + b"9" * 5000)
@example(
    b"a: &a [1,1,1,1,1,1,1,1]\n"
    + b"".join(
        b"b%d: &b%d [%s]\n" % (i, i, b",".join([b"*b%d" % (i - 1) if i else b"*a"] * 9))
        for i in range(12)
    )
)
def test_any_file_is_a_config_or_a_problem(valid, content):
    schema, path = valid
    load(schema, path.parent, content)


@fuzzed
@given(seed=DAMAGE[0], times=DAMAGE[1])
def test_a_damaged_config_is_a_config_or_a_problem(valid, seed, times):
    schema, path = valid
    load(schema, path.parent, damaged(path.read_bytes(), seed, times))


@fuzzed
@given(data=st.data())
def test_any_value_of_a_field_is_accepted_or_a_problem(valid, data):
    schema, path = valid
    values = load_yaml(path.read_text())
    names = st.sampled_from([*config_fields(schema), "policy", "reward", "nothing", "a.b.c"])
    for name in data.draw(st.lists(names, min_size=1, max_size=3)):
        *sections, field = name.split(".")
        place = values
        for section in sections:
            inner = place.get(section)
            place[section] = inner = inner if isinstance(inner, dict) else {}
            place = inner
        place[field] = data.draw(VALUES)
    try:
        content = dump_yaml(values).encode()
    except (UnicodeError, ValueError):  # half a surrogate pair, which no file holds
        return
    load(schema, path.parent, content)


@fuzzed
@given(data=st.data())
def test_any_words_are_accepted_or_a_problem(valid, data):
    schema, path = valid
    names = st.sampled_from(
        [*config_fields(schema), "policy", "learning_rate", "reward_params.a.b"]
    )
    words = names.map("--{}".format) | st.text(max_size=12) | VALUES.map(str)
    with_value = st.tuples(names, VALUES.map(str)).map(lambda pair: "--{}={}".format(*pair))
    given_words = data.draw(st.lists(words | with_value, max_size=5))
    load(schema, path.parent, path.read_bytes(), given_words)


# --- rows -----------------------------------------------------------------------------------------

COLUMNS = st.sampled_from(
    [
        *("messages", "conversations", "prompt", "query", "instruction", "input", "output"),
        *("response", "history", "system", "tools", "chat_template_kwargs", "solution", "images"),
        *("completion", "text", "tag", "loss", "a"),
    ]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt"]) | VALUES,
            "from": st.sampled_from(["human", "function_call"]) | VALUES,
            "content": st.text(max_size=5) | VALUES,
            "value": VALUES,
            "tool_calls": VALUES | st.just([{"function": {"name": "f", "arguments": "{}"}}]),
            "loss": VALUES,
        },
    ),
    max_size=4,
)
ROWS = st.dictionaries(COLUMNS, VALUES | TURNS | TURNS.map(json.dumps), max_size=4)
SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".ndjson"])


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def read_all(folder, content: bytes, suffix: str, tokenizer):
    """Read a file as prompts, as samples and as texts."""
    path = folder / f"fuzzed{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    prompts, samples = (
        DataConfig(dataset=[str(path)]),
        SftDataConfig(dataset=[str(path)]),
    )
    without_surprise(load_prompts, prompts, tokenizer, seed=0)
    for objective in ("sft", "pretrain"):
        rules = SampleRules(objective=objective)
        without_surprise(load_samples, samples, tokenizer, rules, seed=0, vocab_size=64)


@fuzzed
@given(content=st.binary(max_size=80), suffix=SUFFIXES)
@example(content=b"[" * 100_000, suffix=".json")
@example(content=b'{"a":' * 100_000, suffix=".jsonl")
@example(content=b'{"prompt": ' + b"9" * 5000 + b"}", suffix=".jsonl")
@example(content=b"\xef\xbb\xbf", suffix=".csv")
@example(content=b'prompt\n"', suffix=".csv")
@example(content=b"prompt\n\0", suffix=".csv")
def test_any_file_has_rows_or_a_problem(tmp_path_factory, tokenizer, content, suffix):
    read_all(tmp_path_factory.getbasetemp(), content, suffix, tokenizer)


@fuzzed
@given(rows=st.lists(ROWS, min_size=1, max_size=3), suffix=SUFFIXES, together=st.booleans())
def test_any_row_is_read_or_a_problem(tmp_path_factory, tokenizer, rows, suffix, together):
    if suffix[:4] in (".csv", ".tsv"):
        content = csv_text(rows, "," if suffix == ".csv" else "\t")
    else:
        content = json.dumps(rows) if together else "\n".join(map(json.dumps, rows))
    encoded = content.encode("utf-8", "surrogatepass")
    read_all(tmp_path_factory.getbasetemp(), encoded, suffix, tokenizer)


def csv_text(rows, delimiter):
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, escapechar="\\")
    writer.writerow(names)
    for row in rows:
        cells = (row.get(name, "") for name in names)
        writer.writerow(c if isinstance(c, str) else json.dumps(c) for c in cells)
    return text.getvalue()


@fuzzed
@given(seed=DAMAGE[0], times=DAMAGE[1], suffix=SUFFIXES)
def test_a_damaged_file_has_rows_or_a_problem(tmp_path_factory, tokenizer, seed, times, suffix):
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    rows = [{"messages": turns, "target": 3}, {"prompt": "a b", "completion": "c"}]
    if suffix[:4] in (".csv", ".tsv"):
        content = csv_text(rows, "," if suffix == ".csv" else "\t").encode()
    else:
        content = "\n".join(map(json.dumps, rows)).encode()
    read_all(tmp_path_factory.getbasetemp(), damaged(content, seed, times), suffix, tokenizer)


# --- model folders --------------------------------------------------------------------------------


@fuzzed
@given(
    changed=st.dictionaries(st.sampled_from([*MODEL_SIZES, "rope_parameters"]), VALUES, max_size=3)
)
@example(changed={"num_hidden_layers": 10**30})
@example(changed={"model_type": []})
@example(changed={"rope_theta": float("nan")})
def test_any_config_of_a_model_has_a_shape_or_a_problem(tmp_path_factory, changed):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps(MODEL_SIZES | changed))
    without_surprise(read_model_shape, folder)


@fuzzed
@given(seed=DAMAGE[0], times=DAMAGE[1])
def test_a_damaged_config_of_a_model_has_a_shape_or_a_problem(tmp_path_factory, seed, times):
    folder = tmp_path_factory.getbasetemp()
    content = damaged(json.dumps(MODEL_SIZES).encode(), seed, times)
    (folder / "config.json").write_bytes(content)
    without_surprise(read_model_shape, folder)


def test_a_config_of_a_model_that_is_nested_too_deeply_is_a_problem(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' * 100_000)
    assert isinstance(without_surprise(read_model_shape, tmp_path), ValueError)


@fuzzed
@given(seed=DAMAGE[0], times=DAMAGE[1], file=st.sampled_from(["model.safetensors", "index"]))
def test_damaged_weight_files_have_problems(tmp_path_factory, seed, times, file):
    folder = write_model(tmp_path_factory.getbasetemp() / "weights")
    header = folder / "model.safetensors"
    if file == "index":
        names = dict.fromkeys(hf_shapes(folder), header.name)
        content = json.dumps({"metadata": {}, "weight_map": names}).encode()
        (folder / "model.safetensors.index.json").write_bytes(damaged(content, seed, times))
    else:
        with header.open("rb+") as weights:
            content = weights.read(4000)
            weights.seek(0)
            weights.write(damaged(content, seed, times)[:4000])
    without_surprise(lambda: list(weight_problems(folder, read_model_shape(folder))))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


# --- countdown ------------------------------------------------------------------------------------

NUMBERS = st.lists(st.integers(-9, 99), max_size=5)
ANSWERS = st.text("0123456789+-*/() =.^x\n\u00d7\u0663\0", max_size=60)


@fuzzed
@given(answer=ANSWERS | st.text(max_size=40), nums=NUMBERS, target=st.integers())
@example(answer="(" * 400 + "1" + ")" * 400, nums=[1], target=1)
@example(answer="-" * 400 + "1", nums=[1] * 401, target=1)
@example(answer="9" * 499, nums=[9], target=1)
@example(answer="+".join("1" * 240), nums=[1] * 240, target=240)
def test_any_answer_is_right_or_wrong(answer, nums, target):
    assert is_solution(f"<answer>{answer}</answer>", nums, target) in (True, False)
    assert is_solution(answer, nums, target) is False


@fuzzed
@given(nums=VALUES, target=VALUES, response=VALUES, completion=st.text(max_size=20))
@example(nums=[1e400], target=1, response=None, completion="")
@example(nums=["9" * 5000], target=1, response=None, completion="")
@example(nums=[1], target=[1], response=None, completion="<answer>1</answer>")
def test_any_columns_of_countdown_are_scored_or_a_problem(nums, target, response, completion):
    row = {"nums": nums, "target": target, "response": response}
    problem = without_surprise(Countdown.check_row, row)
    columns = {name: [value] for name, value in row.items()}
    scored = without_surprise(Countdown(), [completion], **columns)
    assert isinstance(problem, ValueError) == isinstance(scored, ValueError)


@settings(max_examples=20)
@given(nums=st.lists(st.integers(-99, 10**6), max_size=5), target=st.integers())
def test_the_search_for_a_solution_ends(nums, target):
    expression, searched_all = solve(nums, target)
    assert expression is None or is_solution(f"<answer>{expression}</answer>", nums, target)
    assert searched_all or len(nums) > 4


# --- completions of a run -------------------------------------------------------------------------

COMPLETION = {
    **{"step": 1, "group_id": 0, "group_size": 2, "index": 0, "prompt_id": "a:1", "prompt": "1?"},
    **{"text": "2", "reward": 1.0, "rewards": {"format": 1.0}, "advantage": 0.5, "failures": {}},
    **{"finish_reason": "stop", "num_tokens": 2, "policy_versions": [0], "version_starts": [0]},
}
CHANGES = st.dictionaries(
    st.sampled_from([*COMPLETION, "extra_columns", "completion"]), VALUES, max_size=3
)
LINES = st.lists(
    CHANGES.map(lambda changes: json.dumps(COMPLETION | changes).encode("utf-8", "surrogatepass"))
    | st.tuples(*DAMAGE).map(lambda d: damaged(json.dumps(COMPLETION).encode(), *d))
    | st.binary(max_size=20),
    max_size=4,
)


@fuzzed
@given(lines=LINES)
def test_any_file_of_completions_is_shown_or_a_problem(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "completions.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")

    def show():
        console = Console(file=io.StringIO(), markup=False, highlight=False, emoji=False)
        for group in GroupReader(path).groups(to_end=True):
            print_group(console, group)

    without_surprise(show)


@fuzzed
@given(lines=LINES)
def test_any_file_of_completions_is_scored_or_a_problem(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "scored.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    without_surprise(lambda: group_rows(read_rows(path), RowSources(), None, {}))
