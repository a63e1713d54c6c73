"""Mixed, streamed and difficulty-aware prompts: nothing lost, and continued exactly."""

import json
from collections import Counter
from datetime import datetime

import pyarrow
import pytest
from data_cases import load, word_tokenizer, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tracking_cases import make_config

from rlsys.data import load_prompts
from rlsys.data.streams.difficulty import DifficultySampling
from rlsys.data.streams.in_memory import InMemory
from rlsys.data.streams.make import make_prompt_stream
from rlsys.data.streams.mixed import Mixed
from rlsys.preflight.before_start import check_prompts
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup

WORDS = "abcdefgh"
seeds = st.integers(0, 999)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def prompts_of(size, name="p"):
    return [Prompt(f"{name}:{i}", [{"role": "user", "content": "?"}], [i]) for i in range(size)]


def group_of(prompt, *totals):
    completions = [Completion([1], [0.0], "", "stop", (0,))] * len(totals)
    return RolloutGroup(0, prompt, completions, [RewardOutput(t, {"r": t}) for t in totals])


def ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


def continued(make, stream, after):
    """What `stream` gives next, and what a fresh one gives that loads its state."""
    stream.take(after)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    expected, found = ids(stream.take(30)), ids(resumed.take(30))
    return (expected, stream.epoch, stream.metrics()), (found, resumed.epoch, resumed.metrics())


def test_a_mix_holds_its_weights_and_each_dataset_its_epochs():
    parts = [
        InMemory(prompts_of(n, name), shuffle=True, seed=1) for n, name in ((5, "a"), (40, "b"))
    ]
    mix = Mixed(parts, [3.0, 1.0], seed=1)
    taken = ids(mix.take(4000))
    of_a = [name for name in taken if name.startswith("a")]
    assert abs(len(of_a) / 4000 - 0.75) < 0.03
    counts = Counter(taken)
    for name in "ab":
        own = [count for key, count in counts.items() if key.startswith(name)]
        assert max(own) - min(own) <= 1  # no prompt comes again before all others have come
    assert mix.epoch == (4000 - len(of_a)) / 40


@given(seed=seeds, after=st.integers(0, 100))
@settings(max_examples=30)
def test_a_mix_goes_on_from_its_state(seed, after):
    def make():
        parts = [InMemory(prompts_of(n, f"{n}"), shuffle=True, seed=seed) for n in (3, 7)]
        return Mixed(parts, [0.2, 0.5], seed=seed)

    expected, found = continued(make, make(), after)
    assert found == expected


def difficulty_of(prompts, *, patience=2, exploration=0.1, seed=0):
    source = InMemory(prompts, shuffle=True, seed=seed)
    return DifficultySampling(source, patience=patience, exploration=exploration, seed=seed)


def test_prompts_without_a_signal_come_seldom_and_the_others_always():
    stream = difficulty_of(prompts_of(30))
    rewards = {"p:0": (1.0, 1.0), "p:1": (0.0, 0.0), "p:2": (1.0, float("nan")), "p:3": (0.5, 0.5)}
    for _ in range(200):
        for prompt in stream.take(10):
            stream.observe(group_of(prompt, *rewards.get(prompt.prompt_id, (0.0, 1.0))))
    counts = Counter(ids(stream.take(3000)))
    usual = counts["p:4"]
    for name in ("p:0", "p:1", "p:3"):  # p:2 has one reward only, which says nothing
        assert 0 < counts[name] < 0.25 * usual
    assert all(counts[f"p:{i}"] >= usual - 1 for i in (2, *range(4, 30)))
    metrics = stream.metrics()
    assert metrics["difficulty/num_too_easy"] == 1  # p:0; the mean is about a half
    assert metrics["difficulty/num_too_hard"] == 2
    assert 0.05 < metrics["difficulty/frac_skipped"] < 0.15
    assert stream.num_taken == 5000


def test_one_group_with_different_rewards_brings_a_prompt_back():
    [prompt] = prompts_of(1)
    stream = difficulty_of([prompt], patience=2)
    for _ in range(2):
        stream.observe(group_of(prompt, 0.0, 0.0))
    assert stream.metrics()["difficulty/num_too_hard"] == 1
    assert stream.take(5) == [prompt] * 5  # all is skipped, and yet something comes
    stream.observe(group_of(prompt, 0.0, 1.0))
    assert stream.metrics()["difficulty/num_too_hard"] == 0
    stream.observe(group_of(prompt, 0.0, 0.0))
    assert stream.metrics()["difficulty/num_too_hard"] == 0  # patience starts anew


@given(seed=seeds, after=st.integers(0, 60))
@settings(max_examples=30)
def test_difficulty_sampling_goes_on_from_its_state(seed, after):
    stream = difficulty_of(prompts_of(12), patience=1, exploration=0.2, seed=seed)
    for number, prompt in enumerate(stream.take(12)):
        stream.observe(group_of(prompt, 0.0, float(number % 3 == 0)))
    expected, found = continued(
        lambda: difficulty_of(prompts_of(12), patience=1, exploration=0.2, seed=seed), stream, after
    )
    assert found == expected


def streamed(tokenizer, *sources, seed=0, **options):
    data = load(tokenizer, *sources, seed=seed, streaming=True, **options)
    [stream] = data.streams
    return stream


@given(size=st.integers(1, 30), shuffle=st.booleans(), seed=seeds)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_row_of_a_stream_comes_once_an_epoch(tokenizer, tmp_path, size, shuffle, seed):
    rows = [{"prompt": WORDS[i % 8], "n": i} for i in range(size)]
    one = write_jsonl(tmp_path / "a.jsonl", rows[: size // 2] + rows[size // 2 :])
    stream = streamed(tokenizer, one, seed=seed, shuffle=shuffle, shuffle_buffer_size=8)
    for _ in range(3):
        epoch = [prompt.columns["n"] for prompt in stream.take(size)]
        assert sorted(epoch) == list(range(size))
        assert shuffle or epoch == list(range(size))
    in_memory = {p.prompt_id: p for p in load(tokenizer, one).train}
    assert all(in_memory[p.prompt_id] == p for p in stream.take(size))


def test_a_stream_shuffles_and_two_epochs_and_seeds_differ(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "n": i} for i in range(60)])
    stream = streamed(tokenizer, source, shuffle_buffer_size=20)
    first, second = ids(stream.take(60)), ids(stream.take(60))
    other = ids(streamed(tokenizer, source, seed=1, shuffle_buffer_size=20).take(60))
    assert len({tuple(first), tuple(second), tuple(other), tuple(sorted(first))}) == 4


@given(after=st.integers(0, 90), seed=seeds, weighted=st.booleans(), difficult=st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_goes_on_from_its_state(tokenizer, tmp_path, after, seed, weighted, difficult):
    # Every third row is too long: what is dropped must not move what comes.
    rows = [{"prompt": "a " * (40 if i % 3 == 0 else 1), "n": i} for i in range(25)]
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    config = make_config(
        tmp_path,
        seed=seed,
        data={
            "dataset": sources,
            "streaming": True,
            "shuffle_buffer_size": 7,
            "max_prompt_length": 20,
            "dataset_weights": [1, 2] if weighted else None,
            "difficulty_sampling": difficult,
        },
    )

    def make():
        data = load_prompts(config.data, tokenizer, seed=seed)
        return make_prompt_stream(config, data)

    expected, found = continued(make, make(), after)
    assert found == expected


def test_dropped_rows_of_a_stream_are_counted(tokenizer, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a " * 50}, {"prompt": "b"}]
    stream = streamed(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows), max_prompt_length=20)
    stream.take(4)
    assert stream.metrics() == {"data/num_rows_read": 6.0, "data/num_rows_dropped": 2.0}
    nothing = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a " * 50}])
    with pytest.raises(ValueError, match=r"a whole pass over .*b\.jsonl gave nothing to train on"):
        streamed(tokenizer, nothing, max_prompt_length=20).take(1)


def test_first_rows_of_a_stream_are_checked_at_once_and_later_ones_when_they_come(
    tokenizer, tmp_path
):
    with pytest.raises(ValueError, match=r"line 1: (.|\n)*line 3: "):
        streamed(
            tokenizer,
            write_jsonl(tmp_path / "a.jsonl", [{"prompt": 1}, {"prompt": "a"}, {"prompt": 2}]),
        )
    late = write_jsonl(tmp_path / "b.jsonl", [*[{"prompt": "a"}] * 1200, {"prompt": 3}])
    stream = streamed(tokenizer, late, shuffle=False)
    assert len(stream.take(1200)) == 1200
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1201: (.|\n)*checked when they are"):
        stream.take(1)


def test_a_stream_reads_no_more_than_it_needs(tokenizer, tmp_path):
    rows = [{"prompt": "a"}] * 1000
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    stream = streamed(tokenizer, f"{source}#100", shuffle=False)
    taken = ids(stream.take(250))
    assert taken[:100] == taken[100:200] == [f"a:{n}" for n in range(1, 101)]
    assert stream.epoch == 2.5


def test_data_that_became_shorter_cannot_be_continued(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}] * 9)
    state = streamed(tokenizer, source)
    state.take(9)
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}] * 5)
    with pytest.raises(ValueError, match="was 9 rows into the data, which now has 5"):
        streamed(tokenizer, source).load_state_dict(state.state_dict())


def test_tables_stream_too(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"prompt": c, "n": i} for i, c in enumerate(WORDS)])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    stream = streamed(tokenizer, str(tmp_path / "a.parquet"), shuffle_buffer_size=3)
    assert sorted(p.columns["n"] for p in stream.take(8)) == list(range(8))


@pytest.mark.parametrize("in_state", [True, False])
def test_streamed_columns_that_no_checkpoint_can_hold_are_refused(tokenizer, tmp_path, in_state):
    source = tmp_path / "rows.parquet"
    when = datetime(2024, 1, 1)
    parquet.write_table(
        pyarrow.table({"prompt": ["a", "b"], "when": [when] * 2, "raw": [b"x"] * 2}), source
    )
    config = make_config(
        tmp_path,
        rollout={
            "generation_batch_size": 4,
            "num_generations": 2,
            "max_staleness": 1 if in_state else 0,
        },
        checkpoint={"save_steps": 2},
        reward={"reward_funcs": ["format"]},
        data={"dataset": [str(source)], "streaming": True},
    )
    data = load_prompts(config.data, tokenizer, seed=0)
    if not in_state:
        check_prompts(config, data)
        return
    with pytest.raises(ValueError, match=r"rows\.parquet.*column 'when'.*datetime") as refused:
        check_prompts(config, data)
    assert "column 'raw'" in str(refused.value)
    assert "type bytes" in str(refused.value)
