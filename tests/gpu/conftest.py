"""Ray, models, engines and a run on GPUs, each started once, and early: that is what takes time.

`make test-gpu` runs this folder on a GPU host; elsewhere all of it is skipped. Everything shares
two GPUs (an engine of two needs four). RLSYS_GPU_TESTS_DEVICE=cpu tries the tests themselves.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ACTORS = REPOSITORY / "tests/actors"
sys.path.insert(1, str(ACTORS))

import ray  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from gpu_cases import DEVICE, KINDS, engine_config, save_gpu_model  # noqa: E402
from gpu_lab import CrossedActor, GpuRank, Gpus, OpenActor  # noqa: E402
from greedy_rollouts import greedy  # noqa: E402
from policy_cases import PolicyLab  # noqa: E402
from run_cases import (  # noqa: E402
    own_environment,
    run_config,
    write_run_files,
    write_starter,
)

from rlsys.actors import rollout  # noqa: E402
from rlsys.actors.ray_session import ray_session  # noqa: E402
from rlsys.actors.rollout import RolloutActors  # noqa: E402
from rlsys.actors.waiting import PhaseTimeout, get_all  # noqa: E402

# Of the processes that tests start, where rlsys need not be installed.
PYTHONPATH = os.pathsep.join(
    [str(REPOSITORY), str(Path(__file__).parent), str(ACTORS), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)
START_TIMEOUT_S = 240.0
EARLY = ("engines", "lost_engine", "failing_engines", "short_run")


def num_gpus():
    return torch.cuda.device_count() if DEVICE == "cuda" else 4


def pytest_addoption(parser):
    parser.addoption("--needs-gpus", type=int, metavar="N", help="only tests that need N GPUs")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--needs-gpus", default=None)
    others = []
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker is None:
            continue
        (needed,) = marker.args
        if wanted is not None and wanted != needed:
            others.append(item)
        elif num_gpus() < needed:
            reason = f"needs {needed} CUDA GPUs, and this machine has {num_gpus()}"
            item.add_marker(pytest.mark.skip(reason=reason))
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


_HUNG = set()
"""What did not answer within its deadline: tests that need it would only wait as long again."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except PhaseTimeout:
        _HUNG.add("engines" if "engines" in item.fixturenames else "lab")
        raise


def pytest_runtest_setup(item):
    hung = _HUNG.intersection(item.fixturenames)
    if hung:
        pytest.fail(f"an earlier test waited in vain for what the same {hung} does")


@pytest.fixture(scope="session", autouse=True)
def start_early(request):
    """While the first tests run, what later ones need starts."""
    items = [item for item in request.session.items if not item.get_closest_marker("skip")]
    for name in EARLY:
        if any(name in item.fixturenames for item in items):
            request.getfixturevalue(name)


@pytest.fixture(scope="session")
def gpus():
    session = ray_session(
        num_gpus=None if DEVICE == "cuda" else num_gpus(),
        log_to_driver=False,
        # Matrix products in fp32 are then fp32, so that layouts can be compared closely.
        runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH, "NVIDIA_TF32_OVERRIDE": "0"}},
    )
    with session:
        yield Gpus.reserve(num_gpus())


@pytest.fixture(scope="session")
def gpu_models(tmp_path_factory):
    """Model folders by (kind, seed)."""
    root = tmp_path_factory.mktemp("gpu-models")
    seeds = {"qwen3-tied": (0, 1), "qwen3-untied": (0, 1)}
    folders = {}
    for kind in KINDS:
        for seed in seeds.get(kind, (0,)):
            folders[kind, seed] = root / f"{kind}-{seed}"
            save_gpu_model(folders[kind, seed], kind, seed=seed)
    return folders


@pytest.fixture(scope="session")
def lab(gpus):
    """Makes policies of one or two ranks; each ends the one before."""
    lab = PolicyLab(
        max_ranks=min(num_gpus(), 2), device=DEVICE, rank_class=GpuRank, place=gpus.rank_by_rank
    )
    yield lab
    lab.close()


@dataclass
class Engine:
    """A rollout engine, or two on one GPU, and what it gave before any weight sync, from seed 1."""

    actors: RolloutActors
    kind: str
    fresh: tuple

    @property
    def actor(self):
        (actor,) = self.actors.actors.values()
        return actor

    def ask_workers(self, method):
        """Of all workers, where engines share a GPU of both engines."""
        asked = [actor.ask_workers.remote(method) for actor in self.actors.actors.values()]
        return [answer for answers in ray.get(asked, timeout=60) for answer in answers]


@pytest.fixture(scope="session")
def engines(gpus, gpu_models):
    """Rollout engines by name, perhaps not ready yet, each started from seed 1 of its kind."""
    kinds = {"tied": "qwen3-tied", "untied": "qwen3-untied"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", OpenActor)
        actors = {
            name: RolloutActors(engine_config(gpu_models[kind, 1]), device=DEVICE, place=gpus.on(1))
            for name, kind in kinds.items()
        }
        kinds["shared GPU"] = "qwen3-tied"
        sharing = {"num_engines": 2, "engines_per_gpu": 2, "kv_cache_memory_mb": None}
        config = engine_config(gpu_models["qwen3-tied", 1], **sharing)
        actors["shared GPU"] = RolloutActors(config, device=DEVICE, place=gpus.on(1))
        kinds["crossed"] = "qwen3-untied"
        pair = engine_config(gpu_models["qwen3-untied", 1], tensor_parallel_size=2)
        patch.setattr(rollout, "RolloutActor", CrossedActor)
        actors["crossed"] = RolloutActors(pair, device=DEVICE, place=gpus.none)
        patch.setattr(rollout, "RolloutActor", OpenActor)
        if num_gpus() >= 4:
            kinds["two GPUs"] = "qwen3-untied"
            actors["two GPUs"] = RolloutActors(pair, device=DEVICE, place=gpus.pair)
    started = {}

    def ready(name):
        if name not in started:
            get_all(actors[name].async_start(), phase="start", timeout_s=START_TIMEOUT_S)
            started[name] = Engine(actors[name], kinds[name], greedy(actors[name]))
        return started[name]

    yield ready
    for group in actors.values():
        group.close()


@pytest.fixture(scope="session")
def lost_engine(gpus, gpu_models):
    """As one of `engines`, for tests after which it may be of no use any more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", OpenActor)
        config = engine_config(gpu_models["qwen3-tied", 1])
        actors = RolloutActors(config, device=DEVICE, place=gpus.on(1))
    starting = actors.async_start()

    def ready():
        get_all(starting, phase="start", timeout_s=START_TIMEOUT_S)
        return Engine(actors, "qwen3-tied", greedy(actors))

    yield functools.cache(ready)
    actors.close()


@pytest.fixture(scope="session")
def failing_engines(gpus, gpu_models):
    """References to engines that cannot start, by what is wrong with them."""
    wrong = {
        "no KV cache": {"kv_cache_memory_mb": 4, "max_completion_length": 3000},
        "no free memory": {"kv_cache_memory_mb": None, "gpu_memory_utilization": 1.0},
    }
    folder = gpu_models["qwen3-tied", 1]
    actors = {
        name: RolloutActors(engine_config(folder, **settings), device=DEVICE, place=gpus.on(1))
        for name, settings in wrong.items()
    }
    yield {name: group.async_start() for name, group in actors.items()}
    for group in actors.values():
        group.close()


@pytest.fixture(scope="session")
def short_run(tmp_path_factory):
    """`rlsys grpo`, begun: three steps of a small model, with a reference and running ahead."""
    folder = tmp_path_factory.mktemp("run")
    write_starter(folder / "starter")
    write_run_files(folder, folder / "starter")
    config = run_config(folder / "starter") | {"device": DEVICE, "max_steps": 3, "eval_steps": None}
    config["rollout"] |= {"max_staleness": 1, "kv_cache_memory_mb": 256}
    config["rollout"] |= {"gpu_memory_utilization": 0.2}
    config["policy"]["lr"] = 1e-5  # data one step old then has the policy's log-probs, nearly
    config["checkpoint"] = {"save_steps": None}
    roles = ["policy", "reference", "rollout"]
    config["profile"] = {"steps": "3", "torch": roles, "memory": DEVICE == "cuda"}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlsys.cli", "grpo", "run.yaml"],
            cwd=folder,
            env=own_environment() | {"PYTHONPATH": PYTHONPATH},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish():
        """Exit code, log and the rows of metrics.jsonl."""
        code = process.wait(timeout=START_TIMEOUT_S)
        log = (folder / "log.txt").read_text()
        metrics = folder / "out" / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.open()] if metrics.exists() else []
        return code, log, rows

    finish.folder = folder
    yield finish
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
