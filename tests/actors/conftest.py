"""Ray, tiny models and rollout engines, each started once for all tests of this folder."""

from pathlib import Path

import pytest
from patience import PATIENCE_S
from policy_cases import MODELS, PolicyLab, save_policy_model
from tiny_models import save_tiny_qwen3, save_tiny_qwen3_moe

from rlsys.actors.ray_session import ray_session
from rlsys.actors.rollout import RolloutActors
from rlsys.config import Config


@pytest.fixture(scope="session")
def variable():
    """Name and value of an environment variable of the driver that Ray's own processes have not."""
    return "NCCL_SET_LATER", "yes"


@pytest.fixture(scope="session")
def ray_cluster(variable):
    # Actors of the tests' own classes import the modules beside this file.
    helpers = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    session = ray_session(
        num_cpus=4,
        num_gpus=3,  # which nothing but Ray's bookkeeping believes in
        object_store_memory=200 * 2**20,
        runtime_env=helpers,
        log_to_driver=False,
    )
    with session, pytest.MonkeyPatch.context() as patch:
        patch.setenv(*variable)
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Model folders by (tied, seed), and mixtures of experts by ("experts", seed)."""
    root = tmp_path_factory.mktemp("models")
    folders = {}
    for seed in (1, 2):
        folders["experts", seed] = root / f"experts-{seed}"
        save_tiny_qwen3_moe(folders["experts", seed], seed=seed)
    for tied in (True, False):
        for seed in (1, 2):
            folders[tied, seed] = root / f"{'tied' if tied else 'untied'}-{seed}"
            save_tiny_qwen3(folders[tied, seed], tied=tied, seed=seed)
    return folders


@pytest.fixture(scope="session")
def rollout_config(tiny_models):
    """Configs of rollout engines, by what a test wants different."""

    def build(model_path=tiny_models[True, 1], **rollout):
        return Config.model_validate(
            {
                "output_dir": "unused",
                "max_steps": 1,
                "data": {"dataset": ["unused"], "max_prompt_length": 160},
                "model": {"path": str(model_path)},
                "reward": {"reward_funcs": ["format"]},
                "rollout": {
                    "num_generations": 4,
                    "generation_batch_size": 32,
                    "max_completion_length": 256,
                    "max_num_seqs": 64,
                    **rollout,
                },
                "weight_sync": {"bucket_mb": 1, "timeout_s": PATIENCE_S},
            }
        )

    return build


@pytest.fixture(scope="session")
def engines(ray_cluster, rollout_config):
    """Two engines that started from the tied model 1; tests leave them able to sample."""
    actors = RolloutActors(rollout_config(num_engines=2), device="cpu")
    actors.start()
    yield actors
    actors.close()


@pytest.fixture(scope="session")
def policy_models(tmp_path_factory):
    """Model folders of every architecture that the policy trains, by name."""
    root = tmp_path_factory.mktemp("policy-models")
    for name in MODELS:
        save_policy_model(root / name, name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory):
    """Folders of mixtures of experts by norm_topk_prob."""
    root = tmp_path_factory.mktemp("mixtures")
    for normalised in (True, False):
        save_tiny_qwen3_moe(root / str(normalised), seed=5, norm_topk_prob=normalised)
    return {normalised: root / str(normalised) for normalised in (True, False)}


@pytest.fixture(scope="session")
def lab(ray_cluster):
    """Makes policies of up to 4 ranks; each ends the one before."""
    lab = PolicyLab(max_ranks=4)
    yield lab
    lab.close()
