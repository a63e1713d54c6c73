"""The reward model against transformers, one conversation at a time."""

import asyncio
from dataclasses import replace

import pytest
import torch
from config_cases import values
from reward_models import save_reward_model
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlsys.config import Config, RewardConfig
from rlsys.rewards import orms, settings_of
from rlsys.rewards.pool.serve import RewardRunner, process_settings
from rlsys.rewards.pool.workers import make_pools


def save(folder, **settings):
    save_reward_model(folder, max_length=128, **settings)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(tmp_path_factory.mktemp("reward_model"))


def conversation(text):
    return [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]


def directly(path, text, keep=128):
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    ids = tokenizer.apply_chat_template(conversation(text), return_dict=False)[-keep:]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


TEXTS = ["a", "A longer answer, with words.", "", "0123456789" * 5, "b", "z" * 30, "!"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_score_as_transformers_does_alone(path, batch_size):
    reward = orms["reward_model"](path, batch_size=batch_size)
    scores = asyncio.run(reward(TEXTS, messages=[conversation(text) for text in TEXTS]))
    assert scores == pytest.approx([directly(path, text) for text in TEXTS], abs=1e-5)
    assert len(set(scores)) == len(TEXTS)


def test_the_models_own_template_gets_tools_and_calls_as_it_wants_them(tmp_path):
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '(' + c.function.arguments + ')' }}{% endfor %}"
        "{% endfor %}"
    )
    reward = orms["reward_model"](save(tmp_path / "tools", template=template))
    call = {"type": "function", "function": {"name": "get", "arguments": {"n": 1}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    ids = reward._encode(turns, '[{"name": "get"}]')
    assert "".join(reward._tokenizer.convert_ids_to_tokens(ids)) == 'geta({"n": 1})bc'
    system = [{"role": "system", "content": "s"}, *turns]
    with pytest.raises(ValueError, match="the chat template refuses it: no system"):
        asyncio.run(reward(["c"], messages=[system]))


def test_groups_that_are_scored_together_share_batches(path, monkeypatch):
    reward = orms["reward_model"](path, batch_size=4)
    sizes = []
    logits = reward._logits
    monkeypatch.setattr(reward, "_logits", lambda rows: sizes.append(len(rows)) or logits(rows))

    async def three_groups():
        groups = [TEXTS[:3], TEXTS[3:5], TEXTS[5:]]
        return await asyncio.gather(
            *(reward(group, messages=[conversation(text) for text in group]) for group in groups)
        )

    scores = [score for group in asyncio.run(three_groups()) for score in group]
    assert scores == pytest.approx([directly(path, text) for text in TEXTS], abs=1e-5)
    assert sum(sizes) == len(TEXTS)
    assert max(sizes) == 4


def test_a_conversation_that_is_too_long_keeps_its_end(path):
    text = "x" * 500
    scores = asyncio.run(orms["reward_model"](path)([text], messages=[conversation(text)]))
    assert scores == pytest.approx([directly(path, text)], abs=1e-5)
    short = orms["reward_model"](path, max_length=9)
    scores = asyncio.run(short([text], messages=[conversation(text)]))
    assert scores == pytest.approx([directly(path, text, keep=9)], abs=1e-5)


def test_a_failed_batch_is_an_error_and_the_next_one_is_scored(path, monkeypatch):
    reward = orms["reward_model"](path)
    logits = reward._logits

    def fails(rows):
        monkeypatch.setattr(reward, "_logits", logits)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reward, "_logits", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(reward(["a"], messages=[conversation("a")]))
    assert asyncio.run(reward(["a"], messages=[conversation("a")])) == pytest.approx(
        [directly(path, "a")], abs=1e-5
    )


def test_models_that_are_no_reward_models_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match="has 2 outputs"):
        orms["reward_model"](save(tmp_path / "two", num_labels=2))
    with pytest.raises(ValueError, match="no chat template"):
        orms["reward_model"](save(tmp_path / "none", template=None))
    with pytest.raises(ValueError, match="at least 1"):
        orms["reward_model"](path, batch_size=0)


def test_each_model_has_one_process_of_its_own_however_many_workers():
    config = RewardConfig(
        reward_funcs=["format", "reward_model", "judge", "reward_model:C"],
        reward_model=["org/A", "B"],
        reward_params={"reward_model": {"path": "D"}},
        num_workers=3,
    )
    found = [
        (p.functions, p.concurrent, p.num_workers, p.max_jobs) for p in make_pools(config, None)
    ]
    assert found == [
        (("format",), False, 3, 1),
        (("judge",), True, 1, 256),
        # So few that groups wait here, where their time does not run.
        (("reward_model",), True, 1, 4),
        *(((f"reward_model:{path}",), True, 1, 4) for path in ("C", "org/A", "B")),
    ]


@pytest.mark.parametrize("named_by", ["reward_model", "reward_funcs"])
def test_a_model_is_known_however_it_is_named(named_by):
    reward = {"reward_funcs": ["format"]}
    if named_by == "reward_funcs":
        reward["reward_funcs"] = ["format", "reward_model:org/A"]
    else:
        reward["reward_model"] = ["org/A"]
    config = Config.model_validate(values(reward=reward))
    assert config.reward.model_paths == ["org/A"]
    assert config.policy_shares_gpus
    own = values(reward=reward | {"reward_model_placement": "own"})
    assert not Config.model_validate(own).policy_shares_gpus


def test_several_models_are_named_by_their_paths():
    config = RewardConfig(
        reward_funcs=["format"],
        reward_model=["org/A", "B"],
        reward_params={"reward_model": {"batch_size": 4}, "reward_model:B": {"batch_size": 2}},
    )
    assert config.names == ["format", "reward_model:org/A", "reward_model:B"]
    settings = [settings_of(name, config.params[name], {}) for name in config.names[1:]]
    assert settings == [{"batch_size": 4, "path": "org/A"}, {"batch_size": 2, "path": "B"}]
    assert orms["reward_model:B"] is orms["reward_model"]


def test_a_process_makes_the_functions_of_its_pool_only(path, monkeypatch):
    monkeypatch.setattr("rlsys.rewards.pool.serve.start_guard", lambda limit: None)
    config = RewardConfig(reward_funcs=["format"], reward_model=[path])
    for pool in make_pools(config, None):
        runner = RewardRunner()
        settings = replace(process_settings(config, {}), functions=pool.functions)
        assert runner.start(settings) is None
        assert tuple(runner._rewards) == pool.functions


def test_weights_that_may_run_code_are_not_loaded(tmp_path):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    torch.save({"score.weight": torch.zeros(1, 1)}, tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"no safetensors files.*save it again"):
        orms["reward_model"](str(tmp_path))
