"""A reward model on the GPU that its actor is given scores as on the CPU."""

import pytest
import torch
from gpu_cases import DEVICE
from reward_models import save_reward_model

from rlsys.actors.reward import RewardWorkers
from rlsys.config import RewardConfig
from rlsys.types import Completion, Prompt, RolloutGroup

pytestmark = pytest.mark.gpu(1)
TEXTS = ("4", "It is 4.", "five " * 20, "")


def test_a_reward_model_scores_on_its_gpu_as_on_the_cpu(gpus, tmp_path):
    tokenizer, model = save_reward_model(tmp_path / "model", seed=0)
    asked = [{"role": "user", "content": "2 + 2?"}]
    expected = []
    for text in TEXTS:
        turns = [*asked, {"role": "assistant", "content": text}]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        with torch.inference_mode():
            expected.append(model(input_ids=torch.tensor([ids])).logits[0, 0].item())
    config = RewardConfig(
        reward_model=[str(tmp_path / "model")],
        # Where no GPU is to be seen, this is an error of the start.
        reward_params={"reward_model": {"device": DEVICE, "batch_size": 3}},
    )
    workers = RewardWorkers(config, place=gpus.on(0))
    try:
        workers.start()
        completions = [Completion([1], [0.0], text, "stop", (0,)) for text in TEXTS]
        workers.submit(RolloutGroup(0, Prompt("p", asked, [1], {}), completions))
        while not (scored := workers.collect()):
            workers.wait(1.0)
    finally:
        workers.close()
    assert [reward.total for reward in scored[0].rewards] == pytest.approx(expected, abs=1e-2)
