import torch
from tracking_cases import make_config, make_group

from rlsys.algo.batching import build_train_batch
from rlsys.records import open_run
from rlsys.run.folder import RunDir
from rlsys.tracking import build_tracker
from rlsys.tracking.tokens import tokens_path


def make_batch():
    """Two groups of two completions, of 1 to 9 tokens."""
    groups = [
        make_group(["a", "two"], [0.0, 1.0], group_id=0),
        make_group(["", "ninechars"], [0.0, 1.0], group_id=1),
    ]
    batch = build_train_batch(groups)
    shape = batch.input_ids.shape
    batch.advantages = torch.randn(shape)
    batch.rollout_logprobs = torch.randn(shape)
    return groups, batch


def log(run: RunDir, *steps: int, resumed_from=None, **fields) -> tuple:
    tracker = build_tracker(make_config(run.path, **fields), resumed_from=resumed_from)
    groups, batch = make_batch()
    for step in steps:
        batch.old_logprobs = None if step == 1 else batch.rollout_logprobs + step
        tracker.log_tokens(step, groups, batch)
    tracker.close()
    return groups, batch


def test_tokens_come_back_to_the_bit(tmp_path):
    run = RunDir(tmp_path / "run")
    groups, batch = log(run, 1, 2, tracking={"completion_tokens": True})
    record = open_run(run.path)
    prompt, n = 2, 0
    for group in groups:
        for index, completion in enumerate(group.completions):
            ids = completion.token_ids
            row = slice(prompt, prompt + len(ids))
            found = record.tokens(f"2-{group.group_id}-{index}")
            assert found.ids == ids
            assert found.rollout_logprobs == batch.rollout_logprobs[n, row].tolist()
            assert found.logprobs == batch.old_logprobs[n, row].tolist()
            assert found.advantages == batch.advantages[n, row].tolist()
            assert found.text is None
            assert record.tokens(f"1-{group.group_id}-{index}").logprobs is None
            n += 1
    assert record.tokens("3-0-0") is None
    assert record.tokens("2-9-0") is None


def test_a_completion_that_is_left_out_of_the_loss_has_its_tokens(tmp_path):
    run = RunDir(tmp_path / "run")
    tracker = build_tracker(make_config(run.path, tracking={"completion_tokens": True}))
    groups, batch = make_batch()
    batch.completion_mask = torch.zeros_like(batch.completion_mask)
    tracker.log_tokens(1, groups, batch)
    tracker.close()
    assert len(open_run(run.path).tokens("1-1-1").ids) == 9


def test_the_engines_own_log_probs_are_not_the_policys(tmp_path):
    run = RunDir(tmp_path / "run")
    tracker = build_tracker(make_config(run.path, tracking={"completion_tokens": True}))
    groups, batch = make_batch()
    batch.old_logprobs = batch.rollout_logprobs  # grpo.old_logprobs: rollout
    tracker.log_tokens(1, groups, batch)
    tracker.close()
    assert open_run(run.path).tokens("1-1-1").logprobs is None


def test_tokens_are_kept_only_when_asked_for_and_cut_back_by_a_resume(tmp_path):
    run = RunDir(tmp_path / "run")
    log(run, 1)
    assert not run.tokens.exists()
    log(run, 1, 2, 3, tracking={"completion_tokens": True})
    log(run, resumed_from=1, tracking={"completion_tokens": True})
    assert [step for step in (1, 2, 3) if tokens_path(run, step).exists()] == [1]
    assert run.tokens in run.files


def test_damaged_tokens_are_none(tmp_path):
    run = RunDir(tmp_path / "run")
    log(run, 1, tracking={"completion_tokens": True})
    tokens_path(run, 1).write_bytes(b"PAR1 half a file")
    assert open_run(run.path).tokens("1-0-0") is None
