"""Rows to samples: exact tokens, lengths, counts, splits, streams."""

from copy import deepcopy
from functools import cache

import numpy as np
import pytest
from answer_templates import TEMPLATES, WITH_SYSTEM, tokenizer_of, unmarked
from data_cases import assistant, chat_tokenizer, user, write_jsonl
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlsys.config import SftDataConfig
from rlsys.data.render_samples import SampleRenderer
from rlsys.data.row import Row
from rlsys.data.samples import SampleRules, load_samples
from rlsys.data.streams.make import make_stream
from rlsys.data.target_mask import target_mask, without_thinking
from rlsys.data.targets import parse_sample
from rlsys.json_text import BadRow
from rlsys.model.answer_spans import AnswerSpans
from rlsys.model.chat_template import ChatTemplate

RULES = SampleRules()
PRETRAIN = SampleRules(objective="pretrain")


def load(tokenizer, source, rules=RULES, *, vocab_size=None, **options):
    options = {"shuffle": False} | options
    config = SftDataConfig(dataset=[source] if isinstance(source, str) else source, **options)
    return load_samples(config, tokenizer, rules, seed=0, vocab_size=vocab_size)


def trained(tokenizer, sample) -> str:
    return tokenizer.decode(sample.token_ids[sample.target_mask])


@pytest.fixture
def tokenizer():
    return tokenizer_of(unmarked(TEMPLATES["qwen3"]))


def rows_file(tmp_path, rows, name="a"):
    return write_jsonl(tmp_path / f"{name}.jsonl", rows)


TEXTS = st.text("abc é日🙂<|>", min_size=1, max_size=8).filter(lambda text: text == text.strip())


@pytest.mark.parametrize("name", TEMPLATES)
@given(talk=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), system=st.none() | TEXTS)
@settings(max_examples=15, deadline=None)
def test_tokens_and_mask_are_those_of_transformers(name, talk, system, tmp_path_factory):
    messages = [turn for q, a in talk for turn in (*user(q), *assistant(a))]
    if system is not None and name in WITH_SYSTEM:
        messages.insert(0, {"role": "system", "content": system})
    source = rows_file(tmp_path_factory.mktemp("rows"), [{"messages": messages}])
    expected = tokenizer_of(TEMPLATES[name]).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    [sample] = load(tokenizer_of(unmarked(TEMPLATES[name])), source).train
    assert sample.token_ids.tolist() == expected["input_ids"]
    assert sample.target_mask.tolist() == list(map(bool, expected["assistant_masks"]))
    assert (sample.token_ids.dtype, sample.target_mask.dtype) == (np.int32, np.bool_)


def test_thinking_is_trained_on_or_not(tokenizer, tmp_path):
    source = rows_file(
        tmp_path,
        [
            {"messages": [*user("a"), *assistant("<think>\nr\n</think>\n\nb")]},
            {"messages": [*user("a"), *assistant("c")]},
        ],
    )

    def texts(thinking):
        rules = SampleRules(thinking=thinking)
        return [trained(tokenizer, sample) for sample in load(tokenizer, source, rules).train]

    empty, end = "<think>\n\n</think>\n\n", "<|im_end|>"
    assert texts("train") == [f"<think>\nr\n</think>\n\nb{end}", f"{empty}c{end}"]
    assert texts("ignore") == [f"b{end}", f"c{end}"]
    assert texts("ignore_empty") == [f"<think>\nr\n</think>\n\nb{end}", f"c{end}"]


@pytest.mark.parametrize("template", [None, "Q: {prompt} A:"])
def test_thinking_without_a_chat_template_is_left_out_too(template, tokenizer, tmp_path):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = None
    source = rows_file(tmp_path, [{"prompt": "a", "completion": "<think>r</think>b"}])
    rules = SampleRules(thinking="ignore")
    [sample] = load(tokenizer, source, rules, prompt_template=template).train
    assert trained(tokenizer, sample) == f"b{tokenizer.eos_token}"


def test_only_a_thought_at_the_beginning_is_thinking():
    text = "<think>a</think>b<think>c</think>d"
    assert without_thinking(text, (0, len(text)), only_empty=False) == (16, len(text))
    assert without_thinking("x</think>y", (0, 10), only_empty=False) == (0, 10)
    begun = "<think>\nx</think>y"
    assert without_thinking(begun, (8, len(begun)), only_empty=False) == (17, len(begun))


def test_columns_that_are_not_read_are_named(tokenizer, tmp_path):
    rows = [
        {"query": "a", "response": "b", "tools": [], "level": 1},
        {"instruction": "a", "output": "b", "response": "c", "level": 2},
        {"query": "{{NAME}}", "response": "b", "tag": "zh"},
    ]
    source = rows_file(tmp_path, rows)
    assert load(tokenizer, source, model_name="Bo").notices == [
        f"the column 'level' is not read ({source}, line 1 and 1 more)",
        f"the column 'response' is not read ({source}, line 2)",
    ]


def test_what_the_template_leaves_out_is_named(tokenizer, tmp_path):
    thought = assistant("<think>\nr\n</think>\n\nb")
    rows = [
        {"messages": [*user("a"), *thought, *user("c"), *assistant("d")]},
        {"messages": [*user("a"), *assistant("b"), *user("c")]},
    ]
    source = rows_file(tmp_path, rows)
    first, second = load(tokenizer, source).notices
    assert "leaves out the thinking of a turn that is trained on" in first
    assert "line 1)" in first
    assert "ends with a turn of 'user', not trained on" in second
    last = load(tokenizer, source, SampleRules(loss_on="last")).notices
    assert [notice for notice in last if "thinking" in notice] == []


# --- tokens at the edges -------------------------------------------------------------------------


def merging_tokenizer(*merges):
    """Bytes are tokens, and so are these pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *signs, *("".join(pair) for pair in merges)]
    model = models.BPE({word: i for i, word in enumerate(words)}, list(merges))
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def mask_of(tokenizer, text, span):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    return target_mask(tokenizer, text, ids, offsets, [span]).astype(int).tolist()


@pytest.mark.parametrize(
    ("merges", "text", "span", "expected"),
    [
        ([], "ab", (1, 2), [0, 1]),
        ([], "a日", (1, 2), [0, 1, 1, 1]),
        ([("b", "c")], "abc", (1, 3), [0, 1]),
        ([("Ċ", "Ċ")], "a\n\nb", (2, 4), [0, 0, 1]),  # white space joins the header
        ([("b", "Ċ")], "ab\nc", (1, 2), [0, 1, 0]),  # white space joins the end of the turn
        ([("Ġ", "b")], "a b", (1, 3), [0, 1]),
    ],
)
def test_tokens_of_a_span(merges, text, span, expected):
    assert mask_of(merging_tokenizer(*merges), text, span) == expected


@cache
def greedy_tokenizer(name):
    """Its tokens go across words, line breaks and the borders of turns wherever they can."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    chat = ChatTemplate(tokenizer_of(unmarked(TEMPLATES[name])))
    pairs = [(q, a) for q in ("ab", "b\n", " a") for a in ("ab", "\nb", " a", "日b", "a ")]
    texts = [chat.text([*user(q), *assistant(a)] * 2, is_answered=True) for q, a in pairs]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


@pytest.mark.parametrize("name", ["chatml", "gemma", "plain", "mistral"])
@given(talk=st.lists(st.tuples(*[st.text("ab \n日", min_size=1, max_size=4)] * 2), max_size=3))
@settings(max_examples=40, deadline=None)
def test_targets_are_exact_with_any_merges_or_refused(name, talk):
    messages = [turn for q, a in [*talk, ("ab", "b")] for turn in (*user(q), *assistant(a))]
    assume(all(message["content"].strip() for message in messages))
    tokenizer = greedy_tokenizer(name)
    row = Row(1, "a.jsonl, line 1", {"messages": messages})
    parse_sample(row, system=None)
    SampleRenderer(tokenizer).render([row])
    if row.problem:
        assert "is partly trained on" in row.problem
        return
    expected = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.token_ids == expected["input_ids"]
    ours, theirs = np.array(row.target_mask), np.array(expected["assistant_masks"], dtype=bool)
    # transformers also marks a token of the header that has the white space before an answer.
    assert not (ours & ~theirs).any()
    assert (theirs & ~ours).sum() <= len(row.targets)
    text, spans = AnswerSpans(ChatTemplate(tokenizer), ["<s>", "</s>"]).find(messages, row.targets)
    answers = "".join(text[start:end] for start, end in spans)
    trained_on = tokenizer.decode(np.array(row.token_ids)[ours])
    assert "".join(trained_on.split()) == "".join(answers.split())


@pytest.mark.parametrize(
    ("merges", "text", "span", "says"),
    [
        ([("a", "b")], "ab", (1, 2), "token 'ab' is partly trained on: 'a' and 'b'"),
        ([("b", "c")], "abc", (1, 2), "token 'bc' is partly trained on: 'b' and 'c'"),
        ([("Ġ", "b")], "a b", (2, 3), "token ' b' is partly trained on: ' ' and 'b'"),
    ],
)
def test_a_token_that_is_half_a_target_is_refused(merges, text, span, says):
    with pytest.raises(BadRow, match=says):
        mask_of(merging_tokenizer(*merges), text, span)


def test_tokens_that_are_another_text_are_refused():
    tokenizer = chat_tokenizer("{{ messages }}")
    ids = tokenizer("abX", add_special_tokens=False)["input_ids"]
    with pytest.raises(BadRow, match="the tokens to train on are another text than the answer"):
        target_mask(tokenizer, "abc", ids, [(0, 1), (1, 2), (2, 3)], [(1, 3)])


def test_tokens_outside_the_vocabulary_name_row_and_token(tokenizer, tmp_path):
    rows = [{"query": "a", "response": "b"}] * 2
    source = rows_file(tmp_path, rows)
    load(tokenizer, source, vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match=r"line 1: has the token '<\|im_\w+\|>' of id 2\d\d") as e:
        load(tokenizer, source, vocab_size=200)
    assert str(e.value).endswith(" (also line 2)")


def test_a_template_that_cannot_be_masked_names_the_rows(tmp_path):
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}")
    source = rows_file(tmp_path, [{"query": "a", "response": "b"}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the chat template does not show"):
        load(tokenizer, source)


# --- lengths -------------------------------------------------------------------------------------


def texts_of(tokenizer, samples):
    return [tokenizer.decode(sample.token_ids) for sample in samples]


def test_long_rows_are_dropped_cut_or_an_error(tokenizer, tmp_path):
    rows = [{"query": "a", "response": "b"}, {"query": "a", "response": "b" * 500}]
    source = rows_file(tmp_path, rows)
    whole = load(tokenizer, source).train[1]
    data = load(tokenizer, source, max_length=100)
    assert [sample.sample_id for sample in data.train] == ["a:1"]
    assert data.summary() == [f"data: {source}: 1 of 2 rows used; dropped: 1 over data.max_length"]
    for side, kept in (("right", slice(100)), ("left", slice(-100, None))):
        cut = load(tokenizer, source, max_length=100, truncation_strategy=side).train[1]
        assert cut.token_ids.tolist() == whole.token_ids[kept].tolist()
        assert cut.target_mask[1:].tolist() == whole.target_mask[kept][1:].tolist()
        assert not cut.target_mask[0]
    with pytest.raises(ValueError, match=r"line 2: has 5\d\d tokens, more than data.max_length"):
        load(tokenizer, source, max_length=100, truncation_strategy="error")
    with pytest.raises(ValueError, match=r"every row of .* is over data.max_length = 5 tokens"):
        load(tokenizer, source, max_length=5)


def test_rows_without_a_target_are_dropped_and_counted(tokenizer, tmp_path):
    rows = [
        {"query": "a", "response": "b"},
        {"query": "a" * 200, "response": "b"},
        {"messages": [*user("a"), {"role": "assistant", "content": "b", "loss": False}]},
    ]
    source = rows_file(tmp_path, rows)
    data = load(tokenizer, source, max_length=100, truncation_strategy="right")
    assert data.summary() == [
        f"data: {source}: 1 of 3 rows used; dropped: 2 without a token to train on"
    ]
    with pytest.raises(ValueError, match=r"no row of .* is left: 3 without a token"):
        load(tokenizer, source, SampleRules(loss_on="flag"), max_length=300)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), most=st.integers(2, 15))
@settings(max_examples=30, deadline=None)
def test_pieces_of_a_text_predict_every_token_once(lengths, most, tmp_path_factory):
    tokenizer = chat_tokenizer("{{ messages }}")
    texts = ["abcdefg"[i] * length for i, length in enumerate(lengths)]
    source = rows_file(tmp_path_factory.mktemp("rows"), [{"text": text} for text in texts])
    samples = load(tokenizer, source, PRETRAIN, max_length=most).train
    assert all(2 <= len(sample.token_ids) <= most for sample in samples)
    assert all(not s.target_mask[0] and s.target_mask[1:].all() for s in samples)
    predicted = "".join(trained(tokenizer, sample) for sample in samples)
    assert predicted == "".join(text[1:] + "</s>" for text in texts)
    assert len({sample.sample_id for sample in samples}) == len(samples)


def test_texts_of_a_tokenizer_with_bos_begin_with_it(tmp_path):
    from tokenizers import processors

    tokenizer = chat_tokenizer("{{ messages }}")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    source = rows_file(tmp_path, [{"text": "ab"}, {"text": "<s>ab</s>"}])
    texts = texts_of(tokenizer, load(tokenizer, source, PRETRAIN).train)
    assert texts == ["<s>ab</s>", "<s>ab</s>"]


def test_prompt_and_completion_without_a_chat_template(tmp_path):
    tokenizer = chat_tokenizer("{}")
    tokenizer.chat_template = None
    source = rows_file(tmp_path, [{"prompt": "1 + 1 =", "completion": " 2"}])
    [sample] = load(tokenizer, source).train
    assert texts_of(tokenizer, [sample]) == ["1 + 1 = 2</s>"]
    assert trained(tokenizer, sample) == " 2</s>"
    other = rows_file(tmp_path, [{"query": "1", "response": "2"}], "b")
    with pytest.raises(ValueError, match="no chat template"):
        load(tokenizer, other)


# --- sources -------------------------------------------------------------------------------------


def test_several_sources_sampling_duplicates_and_held_out_rows(tokenizer, tmp_path):
    a = rows_file(tmp_path, [{"query": str(n), "response": "x"} for n in range(10)])
    b = rows_file(tmp_path, [{"query": "0", "response": "x"}, {"query": "b", "response": "y"}], "b")
    data = load(tokenizer, [f"{a}#4", f"{b}#4"], deduplicate=True)
    assert data.train_sizes == [4, 2]
    assert [s.sample_id for s in data.train] == ["a:1", "a:2", "a:3", "a:4", "b:2", "b:2+1"]
    data = load(tokenizer, a, split_dataset_ratio=0.2, val_sets={"b": b}, max_eval_samples=1)
    assert (len(data.train), len(data.validation), len(data.val_sets["b"])) == (8, 1, 1)
    weighted = load(tokenizer, [a, b], dataset_weights=[3, 1], shuffle=True)
    stream = make_stream(SftDataConfig(dataset=[a, b], dataset_weights=[3, 1]), weighted, seed=0)
    drawn = [sample.sample_id[0] for sample in stream.take(400)]
    assert 240 < drawn.count("a") < 360


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("taken", [1, 3, 7, 12])
def test_a_stream_that_cuts_texts_continues_inside_a_row(shuffle, taken, tmp_path):
    tokenizer = chat_tokenizer("{{ messages }}")
    rows = [{"text": "abcdefg"[n] * (5 * n + 3)} for n in range(5)]
    source = rows_file(tmp_path, rows)
    options = {"streaming": True, "shuffle": shuffle, "shuffle_buffer_size": 3, "max_length": 6}

    def stream():
        [found] = load(tokenizer, source, PRETRAIN, **options).streams
        return found

    whole = stream()
    expected = [sample.sample_id for sample in whole.take(60)]
    in_memory = load(tokenizer, source, PRETRAIN, max_length=6).train
    assert sorted(expected[: len(in_memory)]) == sorted(s.sample_id for s in in_memory)
    first = stream()
    first.take(taken)
    resumed = stream()
    resumed.load_state_dict(first.state_dict())
    assert [s.sample_id for s in resumed.take(60 - taken)] == expected[taken:]
    assert resumed.num_taken == 60


def test_a_bad_row_of_a_stream_ends_it_with_its_place(tokenizer, tmp_path):
    rows = [{"query": "a", "response": "b"}] * 1001 + [{"query": "a"}]
    source = rows_file(tmp_path, rows)
    [stream] = load(tokenizer, source, streaming=True).streams
    stream.take(1001)
    with pytest.raises(ValueError, match=r"line 1002: has no turn of the assistant"):
        stream.take(1)


def test_names_of_the_model_are_filled_in(tokenizer, tmp_path):
    rows = [{"query": "Who?", "response": "{{NAME}}", "tag": tag} for tag in ("zh", "en")]
    source = rows_file(tmp_path, rows)
    data = load(tokenizer, source, model_name=["小黄", "Bo"], model_author="Us")
    assert [trained(tokenizer, s).split("\n\n")[-1] for s in data.train] == [
        "小黄<|im_end|>",
        "Bo<|im_end|>",
    ]
    assert data.notices == ["data.model_author is set, and no row has {{AUTHOR}}"]
    with pytest.raises(ValueError, match=r"line 1: has the placeholder \{\{NAME\}\}"):
        load(tokenizer, source)
