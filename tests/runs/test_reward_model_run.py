"""Reward models in a real run: what their actors give is what transformers gives."""

import pytest
import torch
from reward_models import save_reward_model
from run_cases import NUM_PROMPTS, G, RunProcess, write_run_files

from rlsys.files import read_jsonl

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_two_reward_models_score_a_run(starter_model, tmp_path):
    models = {
        name: save_reward_model(tmp_path / name, seed=seed)
        for seed, name in enumerate(("first", "second"))
    }
    write_run_files(tmp_path / "run", starter_model)
    run = RunProcess(
        tmp_path / "run",
        "run.yaml",
        *("--max_steps", "2", "--eval_steps", "null", "--grpo.beta", "0"),
        *("--reward.reward_model", *(str(tmp_path / name) for name in models)),
        *("--reward.reward_weights", "0", "0", "1", "0.5"),
        *("--reward.reward_params", "{reward_model: {batch_size: 3}}"),
    )
    try:
        assert run.wait() == 0, run.log
    finally:
        run.end()
    rows = list(read_jsonl(run.out.completions))
    assert len(rows) == 2 * NUM_PROMPTS * G
    for row in rows:
        expected = []
        for name, (tokenizer, model) in models.items():
            texts = {"user": row["prompt"], "assistant": row["text"]}
            turns = [{"role": role, "content": text} for role, text in texts.items()]
            ids = tokenizer.apply_chat_template(turns, return_dict=False)
            with torch.inference_mode():
                expected.append(model(input_ids=torch.tensor([ids])).logits[0, 0].item())
            found = row["rewards"][f"reward_model:{tmp_path / name}"]
            assert found == pytest.approx(expected[-1], abs=1e-4)
        assert row["reward"] == pytest.approx(expected[0] + 0.5 * expected[1], abs=1e-4)
    for row in read_jsonl(run.out.metrics):
        assert f"rewards/reward_model:{tmp_path / 'first'}/mean" in row
