"""A config by the sizes that decide where its actors are placed."""

from rlsys.config import Config


def config_of(
    *, world_size, tensor_parallel_size, num_engines, engine_size=1, placement_timeout=60.0
):
    return Config.model_validate(
        {
            "output_dir": "unused",
            "max_steps": 1,
            "placement": "dedicated",
            "placement_timeout": placement_timeout,
            "data": {"dataset": ["unused"], "max_prompt_length": 16},
            "model": {"path": "unused"},
            "reward": {"reward_funcs": ["format"]},
            "grpo": {"beta": 0.0},
            "policy": {"world_size": world_size, "tensor_parallel_size": tensor_parallel_size},
            "rollout": {
                "num_generations": 8,
                "generation_batch_size": 64,
                "max_completion_length": 16,
                "num_engines": num_engines,
                "tensor_parallel_size": engine_size,
            },
        }
    )
