"""`rlsys explain` says what completions are sampled from, and what that does to training."""

from config_cases import values

from rlsys.commands.explain_options import (
    describe_passed_through,
    describe_pipeline,
    describe_sampling,
)
from rlsys.config import Config


def sampling(**rollout):
    options = {"generation_batch_size": 16, **rollout}
    return dict(describe_sampling(Config.model_validate(values(rollout=options)).rollout))


def test_plain_sampling_needs_no_warning():
    parts = sampling(temperature=0.7)
    assert parts["sampled from"] == "temperature 0.7"
    assert list(parts) == ["sampled from", "completions end"]


def test_what_cuts_and_penalties_do_to_training_is_said():
    parts = sampling(min_p=0.1, repetition_penalty=1.05)
    assert parts["sampled from"] == "temperature 1, min_p 0.1, repetition_penalty 1.05"
    assert "never sampled and not trained" in parts["left-out tokens"]
    assert "sampled without the penalties it repeats more" in parts["penalties: warning"]


def test_stops_are_named_with_what_is_trained_and_what_rewards_see():
    text = sampling(stop=["\nQ:"], stop_token_ids=[7])["completions end"]
    assert "'\\nQ:', token 7: all tokens up to there are trained on" in text
    assert "the stop is cut off the text that rewards get" in text
    assert "stays in" in sampling(stop=["x"], include_stop_str_in_output=True)["completions end"]


def test_quantised_engines_are_a_warning_with_what_corrects_them():
    text = sampling(quantization="fp8_per_block")["quantised: warning"]
    assert "linear layers in fp8_per_block" in text
    assert "samples are not quite its own" in text
    assert "sampling/logp_difference" in text


def test_speculation_says_who_drafts_and_that_log_probs_stay():
    text = sampling(speculative_config={"method": "ngram", "num_speculative_tokens": 4})["drafts"]
    assert text.startswith("4 tokens at a time by ngram; vLLM keeps a draft with the probability")
    assert "rollout/spec_acceptance_rate" in text
    small = {"model": "org/small", "num_speculative_tokens": 2}
    assert "2 tokens at a time by org/small" in sampling(speculative_config=small)["drafts"]


def test_what_is_passed_through_is_shown_with_where_it_goes():
    sections = {
        "rollout": {"generation_batch_size": 16, "engine_kwargs": {"kv_cache_dtype": "fp8"}},
        "policy": {"megatron_kwargs": {"barrier_with_L1_time": False, "bucket_size": 9}},
        "grpo": {"beta": 0.1},
    }
    pairs = dict(describe_passed_through(Config.model_validate(values(**sections))))
    assert "warning: the engine then samples from other numbers" in pairs["kv_cache_dtype = fp8"]
    assert pairs["barrier_with_L1_time = false"] == (
        "ModelParallelConfig and OptimizerConfig, of policy and reference (policy.megatron_kwargs)"
    )
    assert pairs["bucket_size = 9"].startswith("DistributedDataParallelConfig (")
    assert describe_passed_through(Config.model_validate(values())) == []


def test_what_pipeline_ranks_have_is_shown():
    def pipeline(layout):
        policy = {"world_size": 2, "pipeline_parallel_size": 2, "pipeline_layout": layout}
        return dict(describe_pipeline(Config.model_validate(values(policy=policy)).policy))

    assert pipeline("E|t*4L") == {
        "pipeline rank 0": "the embedding",
        "pipeline rank 1": "layers 0 to 3 and the output",
    }
    interleaved = pipeline("Et|tt|t|L")
    assert interleaved["pipeline rank 0"] == "the embedding and layer 0; then layer 3"
    assert interleaved["pipeline rank 1"] == "layers 1 to 2; then the output"
    assert "filled up to a multiple of 2" in interleaved["micro-batches"]
    assert pipeline(None) == {}
