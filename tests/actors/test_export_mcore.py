"""`rlsys export --to mcore`: every family there and back, and into ranks of any layout."""

import json
import subprocess
import sys

import pytest
import torch
from family_models import MODELS, save_family_model
from policy_cases import LAYOUTS, exported, policy_config, save_policy_model
from safetensors.torch import load_file, save_file

from rlsys.engines.megatron.mcore_files import check_mcore_files, mcore_weights

pytestmark = pytest.mark.system

PADDED = "qwen3-tied"
"""One of `policy_cases`, whose vocabulary ranks fill up."""
MTP = "glm4_moe with a layer that predicts further tokens"
USUAL = ["deepseek_v3", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", PADDED, MTP]
GROUPS = [USUAL, [name for name in MODELS if name not in USUAL]]
RUN_ALL = """
import json, sys
from rlsys import cli
codes = [cli.main(words) for words in json.loads(sys.argv[1])]
print("RESULT", codes, sorted({"ray", "vllm"} & {name.split(".")[0] for name in sys.modules}))
"""


def export(*commands):
    """Exit codes, forbidden modules and output of one process that runs `rlsys export` often."""
    words = [["export", *map(str, command)] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(words)], capture_output=True, text=True
    )
    assert "RESULT" in done.stdout, done.stdout + done.stderr
    output, _, result = done.stdout.rpartition("RESULT ")
    codes, _, heavy = result.strip().partition("] ")
    return json.loads(codes + "]"), heavy, output + done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> (source, megatron-core's folder, the way back).

    One process writes all of GROUPS that a name is in, when a test first asks for it.
    """
    root, written = tmp_path_factory.mktemp("mcore"), {}

    def of(name):
        if name not in written:
            group = next(group for group in GROUPS if name in group)
            written.update(there_and_back(root, group))
        return written[name]

    return of


def save_source(folder, name):
    if name == MTP:
        save_family_model(folder, "glm4_moe", num_nextn_predict_layers=1)
        further = {"model.layers.4.shared_head.head.weight": torch.randn(4, 4)}
        save_file(further, folder / "mtp.safetensors", metadata={"format": "pt"})
    else:
        (save_family_model if name in MODELS else save_policy_model)(folder, name)


def there_and_back(root, names):
    """Name -> the three folders, with logits compared after each of the two commands."""
    places = {
        name: tuple(root / name / kind for kind in ("source", "mcore", "back")) for name in names
    }
    commands = []
    for name, (source, mcore, back) in places.items():
        save_source(source, name)
        commands += [
            (source, "--to", "mcore", mcore, "--test_convert_precision", "--per_layer"),
            (mcore, "--to", "hf", back, "--test_convert_precision"),
        ]
    codes, heavy, output = export(*commands)
    assert codes == [0] * len(commands), output
    assert heavy == "[]"
    assert output.count("precision test passed") == len(commands)
    return places


def same(tensors, others):
    assert tensors.keys() == others.keys()
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def tensors_of(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize(
    "name", [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in GROUPS[1])]
)
def test_there_and_back_is_bit_equal(folders, name):
    source, mcore, back = folders(name)
    assert same(tensors_of(back), tensors_of(source))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for folder in (mcore, back):
            assert (folder / file).read_bytes() == (source / file).read_bytes()
    assert not any(mcore.glob("*.safetensors"))
    assert not (back / "latest_checkpointed_iteration.txt").exists()


def with_experts(layout, name):
    is_moe = "moe" in name or "deepseek" in name
    experts = {"expert_model_parallel_size": 2} if is_moe else {}
    return LAYOUTS[layout] | (experts if layout != "PP 2" else {})


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2", "TP 2"),
        ("qwen3_moe", "TP 2"),  # and EP 2
        ("qwen3_moe", "DP 2"),  # and EP 2
        ("qwen3_moe", "PP 2"),
        pytest.param("glm4_moe", "TP 2", marks=pytest.mark.slow),  # and EP 2
        pytest.param("deepseek_v3", "TP 2", marks=pytest.mark.slow),  # and EP 2
        pytest.param("deepseek_v3", "PP 2", marks=pytest.mark.slow),
        pytest.param("phi3", "TP 2", marks=pytest.mark.slow),
        pytest.param("olmo3", "PP 2", marks=pytest.mark.slow),
        (PADDED, "TP 2"),
        (PADDED, "PP 2"),
        pytest.param("qwen2", "TP 2 x PP 2", marks=pytest.mark.slow),
        pytest.param("llama", "CP 2 x DP 2", marks=pytest.mark.slow),
    ],
)
def test_ranks_of_any_layout_load_their_parts(lab, folders, name, layout):
    source, mcore, _ = folders(name)
    policy = lab.policy(policy_config(source, **with_experts(layout, name)))
    for strictly in (False, True):
        policy.call("change_weights", False)
        assert not same(exported(policy), load_file(source / "model.safetensors"))
        policy.call("load_mcore", mcore, strictly)
        assert same(exported(policy), load_file(source / "model.safetensors"))


def test_damaged_foreign_and_dangerous_folders_are_refused(folders, tmp_path):
    _, mcore, _ = folders("qwen3")

    def copy(name, change):
        folder = tmp_path / name
        subprocess.run(["cp", "-r", mcore, folder], check=True)
        change(folder)
        return folder

    def of_another_shape(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))

    def deeper(folder):
        config = json.loads((folder / "config.json").read_text())
        changed = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
        (folder / "config.json").write_text(json.dumps(config | changed))

    def truncated(folder):
        file = max((folder / "release").glob("*.distcp"), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1000])

    def with_code(folder):
        (folder / "release/.metadata").write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")

    def with_code_beside(folder):
        (folder / "release/common.pt").write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")

    def too_large_a_vocabulary(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 600}))

    cases = {
        "wide": (of_another_shape, "by config.json"),
        "deep": (deeper, "different models"),
        "vocabulary": (too_large_a_vocabulary, "different models"),
        "cut": (truncated, "is cut off"),
        "missing": (lambda f: next((f / "release").glob("*.distcp")).unlink(), "names: copy it"),
        "config": (lambda f: (f / "config.json").unlink(), "swift export --to_hf"),
        "index": (lambda f: (f / "release/.metadata").unlink(), "hidden files too"),
        "code": (with_code, "it names posix.system"),
        "common": (with_code_beside, "could run code"),
    }
    places = {name: copy(name, change) for name, (change, _) in cases.items()}
    codes, _, output = export(
        *((place, "--to", "hf", tmp_path / f"out-{name}") for name, place in places.items()),
        (mcore, "--to", "hf", tmp_path / "out-step", "--step", "3"),
    )
    assert codes == [2] * (len(cases) + 1), output
    for _, words in cases.values():
        assert words in output
    assert "--step is for a run" in output
    assert not any(tmp_path.glob("out-*"))
    assert not any(tmp_path.rglob("hacked"))


WRONG = """
import shutil, sys
from rlsys import cli
import rlsys.commands.export as command
source, other, out = sys.argv[1:]
command.write_mcore = lambda export: shutil.copytree(other, export.out)
words = ["export", source, "--to", "mcore", out, "--test_convert_precision", "--per_layer"]
print("RESULT", cli.main(words))
"""


@pytest.mark.slow
def test_weights_that_are_wrong_by_little_fail_the_precision_test(folders, tmp_path):
    source, _, _ = folders("qwen3")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.k_norm.weight"] *= 1.1
    subprocess.run(["cp", "-r", source, tmp_path / "other"], check=True)
    save_file(tensors, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    codes, _, output = export((tmp_path / "other", "--to", "mcore", tmp_path / "wrong"))
    assert codes == [0], output
    words = [source, tmp_path / "wrong", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", WRONG, *map(str, words)], capture_output=True, text=True
    )
    assert "RESULT 1" in done.stdout, done.stdout + done.stderr
    assert "precision test FAILED" in done.stdout
    rows = [line.split("\u2502") for line in done.stdout.splitlines() if "\u2502" in line]
    means = {cells[1].strip(): float(cells[2]) for cells in rows}
    assert means["layer 0"] < 1e-5 < 1e-3 < means["layer 1"]


@pytest.mark.slow
def test_mixed_types_and_a_narrow_one(folders, tmp_path):
    source, _, _ = folders("qwen3")
    tensors = load_file(source / "model.safetensors")
    mixed = {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()}
    subprocess.run(["cp", "-r", source, tmp_path / "mixed"], check=True)
    save_file(mixed, tmp_path / "mixed/model.safetensors", metadata={"format": "pt"})
    codes, _, output = export(
        (tmp_path / "mixed", "--to", "mcore", tmp_path / "wide"),
        (tmp_path / "wide", "--to", "hf", tmp_path / "wide-hf"),
        (source, "--to", "mcore", tmp_path / "narrow", "--dtype", "bfloat16"),
        (tmp_path / "narrow", "--to", "hf", tmp_path / "narrow-hf"),
    )
    assert codes == [0] * 4, output
    assert "written as float32, the widest of the stored types" in output
    wide = load_file(tmp_path / "wide-hf/model.safetensors")
    assert same(wide, {name: tensor.float() for name, tensor in mixed.items()})
    narrow = load_file(tmp_path / "narrow-hf/model.safetensors")
    assert same(narrow, {name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_the_folder_is_a_release_of_megatron_lm(folders):
    """Its loader looks for these, and takes query, key and value apart where the version is old."""
    _, mcore, _ = folders("qwen3_moe")
    assert (mcore / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert mcore_weights(mcore) == mcore / "release"
    check_mcore_files(mcore)
    common = torch.load(mcore / "release/common.pt", weights_only=True)
    assert common["checkpoint_version"] == 3.0
    assert common["content_metadata"]["singleton_local_shards"] is False
