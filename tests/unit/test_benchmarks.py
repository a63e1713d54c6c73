"""What benchmarks compute besides times, whether what they ask of a GPU fits, and the suite."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlsys.model.memory_options import memory_option_problems
from rlsys.model.shape import read_model_shape

REPOSITORY = Path(__file__).parents[2]
H200_GIB = 139.8


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Makes benchmarks/ importable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def policy_update(benchmarks):
    return importlib.import_module("policy_update")


@pytest.fixture(scope="module")
def gpu_suite(benchmarks):
    return importlib.import_module("gpu_suite")


@pytest.fixture(scope="module")
def folders(policy_update, tmp_path_factory):
    """Folders with the config.json of each shape."""
    random_model = sys.modules["random_model"]
    root = tmp_path_factory.mktemp("shapes")
    for name, shape in random_model.SHAPES.items():
        config = random_model.hf_config(shape)
        config.architectures = [shape.family.__name__.replace("Config", "ForCausalLM")]
        config.save_pretrained(root / name)
    return root


def arguments_of(policy_update, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["policy_update.py", *options])
    return policy_update.parse_arguments()


def test_flops_count_causal_attention_and_active_experts(policy_update, folders):
    def flops(name, length, **options):
        shape = read_model_shape(folders / name)
        return policy_update.flops_per_token(shape, length, **options)

    # Qwen2.5-1.5B: 1.5437e9 parameters; each query sees half of the keys on average.
    assert flops("qwen2.5-1.5b", 0) == pytest.approx(6 * 1.5437e9, rel=1e-4)
    extra = flops("qwen2.5-1.5b", 2048) - flops("qwen2.5-1.5b", 1024)
    assert extra == 12 * 28 * 1536 * 1024 / 2
    # The head counts and the embedding does not, so tied or not makes no difference.
    assert flops("qwen2.5-7b", 0) == pytest.approx(6 * 7.07e9, rel=1e-3)
    # 8 of 128 experts, and a dense model with as many weights for each token.
    experts = flops("qwen3-30b-a3b-8-layers", 4096)
    assert experts == pytest.approx(flops("qwen3-a3b-dense-8-layers", 4096), rel=0.005)
    # A frozen weight needs no gradient.
    frozen = flops("qwen2.5-1.5b", 0, adapters=1000)
    assert frozen == pytest.approx(4 / 6 * flops("qwen2.5-1.5b", 0) + 6000)


def test_what_one_gpu_shows_fits_one_h200(policy_update, folders, monkeypatch):
    arguments = arguments_of(policy_update, monkeypatch, "--variants", "one_gpu")
    assert arguments.variants == policy_update.GROUPS["one_gpu"]
    for name in arguments.variants:
        own = policy_update.asked(name, arguments)
        own.model = str(folders / own.shape)
        settings = policy_update.settings_of(name)
        policy = {key: settings[key] for key in settings if key not in policy_update.BENCHMARK}
        config = policy_update.make_config(own, policy)
        shape = read_model_shape(folders / own.shape)
        problems = memory_option_problems(
            config.policy, shape, device="cuda", dtype="bfloat16", capability=(9, 0)
        )
        assert [problem.text for problem in problems] == [], name
        estimate = policy_update.estimated_gib(config, SimpleNamespace(folder=Path(own.model)))
        assert estimate["all"] < 0.9 * H200_GIB, name


def test_variants_are_small_on_cpu(policy_update, monkeypatch):
    arguments = arguments_of(policy_update, monkeypatch, "--device", "cpu", "--shape", "tiny")
    own = policy_update.asked("moe+rows_32k", arguments)
    assert (own.shape, own.rows, own.tokens) == ("tiny-moe", 2, 512)
    assert policy_update.asked("lora", arguments).shape == "tiny"


def test_unknown_variants_are_named(policy_update, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        arguments_of(policy_update, monkeypatch, "--variants", "rows_4k+fp9")
    assert "unknown: fp9; known: default," in capsys.readouterr().err


def run_suite(gpu_suite, folder, parts, *, gib):
    suite = gpu_suite.Suite(parts, out=folder, gib=gib, seconds=60.0, settings={})
    suite.run()
    written = json.loads((folder / f"gpu_suite_{len(gib)}.json").read_text())
    assert written["parts"] == suite.ran
    assert written["not_run"] == suite.not_run
    assert {"date", "commit", "versions", "gpus"} <= written["machine"].keys()
    return suite


def script(folder, name, text):
    """The command of a part."""
    file = folder / f"{name}.py"
    file.write_text(text)
    return [str(file)]


def meeting(folder, own, other, then=""):
    """A part that ends well only if another one runs at the same time."""
    return script(
        folder,
        own,
        f"""
import pathlib, time
folder = pathlib.Path({str(folder)!r})
(folder / "{own}").touch()
while not (folder / "{other}").exists():
    time.sleep(0.01)
{then}
""",
    )


@pytest.mark.processes
def test_parts_run_side_by_side_where_memory_allows(gpu_suite, tmp_path):
    commands = {
        "a": meeting(tmp_path, "a", "b"),
        "b": meeting(tmp_path, "b", "a"),
        "c": script(tmp_path, "c", ""),
    }
    parts = {name: gpu_suite.Part(line, 0, 50, gib=30) for name, line in commands.items()}
    parts["speed"] = gpu_suite.Part(script(tmp_path, "speed", ""), 0, 50)
    suite = run_suite(gpu_suite, tmp_path, parts, gib=[70.0])
    assert {name: part["rc"] for name, part in suite.ran.items()} == dict.fromkeys(parts, 0)
    assert "b" in suite.ran["a"]["beside"]
    assert len(suite.ran["c"]["beside"]) <= 1  # three do not fit
    assert suite.ran["speed"]["beside"] == []
    assert suite.not_run == {}


@pytest.mark.processes
def test_parts_of_one_gpu_have_different_gpus(gpu_suite, tmp_path):
    show = "import json, os; print(json.dumps({'seen': os.environ['CUDA_VISIBLE_DEVICES']}))"
    parts = {
        "one": gpu_suite.Part(meeting(tmp_path, "one", "two", show), 0, 50),
        "two": gpu_suite.Part(meeting(tmp_path, "two", "one", show), 0, 50),
        "both": gpu_suite.Part(script(tmp_path, "both", show), 0, 50, gpus=2),
    }
    suite = run_suite(gpu_suite, tmp_path, parts, gib=[80.0, 80.0])
    seen = {name: part["results"]["seen"] for name, part in suite.ran.items()}
    assert sorted([seen["one"], seen["two"]]) == ["0", "1"]
    assert seen["both"] == "0,1"


@pytest.mark.processes
def test_what_the_time_did_not_allow_is_named(gpu_suite, tmp_path):
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    parts = {
        "hangs": gpu_suite.Part(script(tmp_path, "hangs", hang), 0, 1),
        "too long": gpu_suite.Part(script(tmp_path, "long", ""), 1000, 2000),
        "fails": gpu_suite.Part(script(tmp_path, "fails", "raise SystemExit('no GPU')"), 0, 50),
    }
    suite = run_suite(gpu_suite, tmp_path, parts, gib=[0.0])
    assert suite.ran["hangs"]["rc"] == "time was up"
    assert suite.ran["fails"]["rc"] == 1
    assert "no GPU" in suite.ran["fails"]["said"]
    assert suite.not_run.keys() == {"too long"}
    assert "it takes 1000 s" in suite.not_run["too long"]


@pytest.mark.processes
def test_results_of_benchmarks_and_tests_are_kept(gpu_suite, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the inner one then starts sooner
    report = json.dumps({"machine": {}, "seconds": 2.5, "of": {"error": "no room"}}, indent=2)
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False, 'wrong weights'\n"
        "def test_skipped(): pytest.skip('needs 2 CUDA GPUs')\n"
    )
    tests = ["-m", "pytest", str(tmp_path / "test_three.py"), "--junitxml={out}/tests_1.xml"]
    printing = f"print('a note')\nprint({report!r})"
    parts = {
        "speed": gpu_suite.Part(script(tmp_path, "speed", printing), 0, 50),
        "tests 1": gpu_suite.Part([*tests, "-p", "no:cacheprovider"], 0, 50, gib=30),
    }
    suite = run_suite(gpu_suite, tmp_path, parts, gib=[0.0])
    assert suite.ran["speed"]["results"] == {"seconds": 2.5, "of": {"error": "no room"}}
    assert suite.ran["speed"]["problems"] == {"of: error": "no room"}
    assert not gpu_suite.went_well(suite.ran["speed"])
    counts = suite.ran["tests 1"]["tests"]
    assert counts["passed"] == 1
    assert "wrong weights" in counts["failed"]["test_three::test_fails"]
    assert counts["skipped"] == {"test_three::test_skipped": "needs 2 CUDA GPUs"}
    assert suite.ran["tests 1"]["rc"] == 1


def parts_of(gpu_suite, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", "unused", *options])
    return gpu_suite.chosen_parts(gpu_suite.parse_arguments())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_benchmarks_know_the_options_of_the_suite(gpu_suite, monkeypatch, gpus, device):
    parts = parts_of(gpu_suite, monkeypatch, "--gpus", gpus, "--device", device)
    lines = [p.command for p in parts.values() if p.command[0].startswith("benchmarks/")]
    assert lines
    for line in lines:
        benchmark = importlib.import_module(Path(line[0]).stem)
        monkeypatch.setattr(sys, "argv", line)
        parsed = benchmark.parse_arguments()
        assert not isinstance(parsed, tuple) or parsed[1] == []  # options of rlsys grpo


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_every_gpu_test_is_in_one_part_of_the_suite(gpu_suite, monkeypatch, gpus):
    parts = parts_of(gpu_suite, monkeypatch, "--gpus", gpus)
    *apart, others = [part.command for part in parts.values() if part.command[1] == "pytest"]
    named = [text for command in apart for text in command if text.endswith(".py")]
    assert len(named) == len(set(named))
    assert all((REPOSITORY / file).exists() for file in named)
    ignored = [text.partition("=")[2] for text in others if text.startswith("--ignore=")]
    assert sorted(ignored) == sorted(named)
    assert "tests/gpu" in others


def test_gpus_are_watched_between_two_moments(benchmarks):
    watch = importlib.import_module("gpu_watch").GpuWatch(None)
    for at, line in enumerate(["0, 90, 1024", "0, 50, 4096", "N/A", "1, 0, 512", "0, 70, 2048"]):
        watch.note(at, line)
    assert watch.between(0, 4) == {
        "idle_share_by_nvidia_smi": {"GPU 0": pytest.approx(0.4), "GPU 1": 1.0},
        "peak_gib_by_nvidia_smi": {"GPU 0": 4.0, "GPU 1": 0.5},
    }


def test_a_step_is_compared_with_its_phases_alone(benchmarks):
    against_alone = importlib.import_module("grpo_run").against_alone
    alone = {"rollout": 4.0, "policy_update": 5.0, "weight_sync": 1.0}
    found = against_alone({"step_s": 11.5}, alone)
    assert found == {"phases_alone_s": alone, "step over sum of phases alone": pytest.approx(1.15)}
