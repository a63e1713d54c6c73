"""What benchmarks compute besides times: FLOPs, and whether what they ask of a GPU fits."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlsys.model.memory_options import memory_option_problems
from rlsys.model.shape import read_model_shape

REPOSITORY = Path(__file__).parents[2]
H200_GIB = 139.8


@pytest.fixture(scope="module")
def policy_update():
    """benchmarks/policy_update.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "benchmarks"))
        import policy_update

        yield policy_update


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
