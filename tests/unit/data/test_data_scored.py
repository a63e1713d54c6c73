"""Rows for a score head: pairs with margins, texts and conversations with labels, bad rows."""

import pytest
from answer_templates import TEMPLATES, tokenizer_of, unmarked
from data_cases import assistant, user, word_tokenizer, write_jsonl

from rlsys.config import ScoreDataConfig
from rlsys.data.scored import EMPTY, SAME, load_scored
from rlsys.data.scored_rows import PAIRS, ScoreRules
from rlsys.model.chat_template import ChatTemplate

PAIR = {"prompt": user("1 + 1?"), "chosen": assistant("Two"), "rejected": assistant("Three")}
CLASSES = ScoreRules("single_label_classification", 3, ("bad", "fair", "good"))
SEVERAL = ScoreRules("multi_label_classification", 3, ("bad", "fair", "good"))
NUMBERS = ScoreRules("regression", 1)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(unmarked(TEMPLATES["qwen3"]))


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(*rows, rules=PAIRS, tokenizer=tokenizer, pad=None, **options):
        source = write_jsonl(tmp_path / "a.jsonl", list(rows))
        config = ScoreDataConfig(
            dataset=[source], **{"shuffle": False, "max_length": 200} | options
        )
        return load_scored(config, tokenizer, rules, seed=0, pad_token_id=pad)

    return load


def test_pairs_are_rendered_as_the_reward_model_of_grpo_does(load, tokenizer):
    [row] = load(PAIR | {"margin": "0.5"}).train
    template = ChatTemplate(tokenizer)
    expected = [
        template.answered_tokens([*PAIR["prompt"], *answer], None)
        for answer in (PAIR["chosen"], PAIR["rejected"])
    ]
    assert [text.tolist() for text in row.texts] == expected
    assert row.label == (0.5,)
    assert row.row_id == "a:1"


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "1 + 1?", "chosen": "Two", "rejected": "Three"},
        {"messages": [*user("1 + 1?"), *assistant("Two")], "rejected_response": "Three"},
        {name: [*PAIR["prompt"], *PAIR[name]] for name in ("chosen", "rejected")},
    ],
    ids=["TRL, texts", "ms-swift", "TRL, implicit prompt"],
)
def test_every_format_of_pairs_is_the_same(load, other):
    [expected], [row] = load(PAIR).train, load(other).train
    assert [text.tolist() for text in row.texts] == [text.tolist() for text in expected.texts]
    assert row.label == (0.0,)


def test_plain_texts_of_pairs_end_with_eos(load, tokenizer):
    [row] = load({"chosen": "1 + 1? Two", "rejected": "1 + 1? Three"}).train
    decoded = [tokenizer.decode(text) for text in row.texts]
    end = tokenizer.eos_token
    assert decoded == [f"1 + 1? Two{end}", f"1 + 1? Three{end}"]


def test_labelled_texts_are_what_the_tokenizer_makes_of_them(load):
    words = word_tokenizer()  # writes <s> before a text
    words.eos_token = "<s>"
    [row] = load({"text": "a b c", "label": 2}, rules=CLASSES, tokenizer=words).train
    assert row.texts[0].tolist() == words("a b c")["input_ids"]
    assert row.label == (2.0,)


def test_conversations_with_labels(load, tokenizer):
    rows = [
        {"messages": user("Hello"), "label": "good"},
        {"query": "Hello", "response": "Hi", "label": 0},
        {"prompt": "Hello", "completion": "Hi", "label": 0},
        {"prompt": user("Hello"), "completion": assistant("Hi"), "label": 0},
    ]
    asked, answered, *others = load(*rows, rules=CLASSES).train
    template = ChatTemplate(tokenizer)
    assert asked.texts[0].tolist() == template.answered_tokens(user("Hello"), None)
    conversation = [*user("Hello"), *assistant("Hi")]
    for row in (answered, *others):
        assert row.texts[0].tolist() == template.answered_tokens(conversation, None)
    assert (asked.label, answered.label) == ((2.0,), (0.0,))


@pytest.mark.parametrize(
    ("rules", "label", "expected"),
    [
        (CLASSES, 1, (1.0,)),
        (CLASSES, "good", (2.0,)),
        (SEVERAL, [0, "good"], (1.0, 0.0, 1.0)),
        (SEVERAL, "[1]", (0.0, 1.0, 0.0)),
        (SEVERAL, [], (0.0, 0.0, 0.0)),
        (CLASSES, "2", (2.0,)),
        (ScoreRules("single_label_classification", 2, ("1", "0")), "1", (0.0,)),
        (NUMBERS, 0.25, (0.25,)),
        (NUMBERS, "-0.25", (-0.25,)),
        (ScoreRules("regression", 2), "[1, -2.5]", (1.0, -2.5)),
        (ScoreRules("regression", 2), [1, -2.5], (1.0, -2.5)),
    ],
)
def test_labels_of_each_kind(load, rules, label, expected):
    [row] = load({"text": "a text", "label": label}, rules=rules).train
    assert row.label == expected


@pytest.mark.parametrize(
    ("rules", "row", "says"),
    [
        (CLASSES, {"label": 3}, "has the class 3, and the run has 3 classes, 0 to 2, or bad, fair"),
        (CLASSES, {"label": -1}, "has the class -1"),
        (CLASSES, {"label": "bads"}, "has 'bads': a class is wanted, 0 to 2, or bad, fair, good"),
        (CLASSES, {"label": True}, "has True: a class is wanted"),
        (CLASSES, {"label": 1.0}, "has 1.0: a class is wanted"),
        (CLASSES, {"label": None}, "has no column 'label'"),
        (SEVERAL, {"label": 1}, "is 1: a list of classes (0 to 2, or bad, fair, good) is wanted"),
        (SEVERAL, {"label": [1, 1]}, "names a class twice"),
        (SEVERAL, {"label": [7]}, "has the class 7, and the run has 3 classes"),
        (NUMBERS, {"label": "high"}, "has 'high': a number is wanted"),
        (NUMBERS, {"label": "true"}, "has True: a number is wanted"),
        (NUMBERS, {"label": 1e39}, "has 1e+39: a finite number is wanted, up to 1e+18"),
        (NUMBERS, {"label": 10**400}, "a finite number is wanted, up to 1e+18"),
        (ScoreRules("regression", 2), {"label": 1}, "has 1 number, and reward_model.num_labels"),
        (NUMBERS, {"label": [1, 2]}, "has 2 numbers, and reward_model.num_labels is 1"),
        (CLASSES, {"label": 1, "text": ""}, "the column 'text' is empty"),
        (CLASSES, {"label": 1, "text": 5}, "the column 'text' is not a text"),
        (PAIRS, PAIR | {"margin": "much"}, "the column 'margin' has 'much': a number is"),
        (PAIRS, PAIR | {"rejected": PAIR["chosen"]}, "the same, 'Two'"),
        (PAIRS, {"chosen": "one", "rejected": "one"}, "text are the same, 'one'"),
        (PAIRS, {"chosen": "one", "rejected": None}, "pair"),
    ],
)
def test_a_row_that_teaches_nothing_is_named(load, rules, row, says):
    is_pair = rules.problem_type == "preference"
    labels = {SEVERAL: [0], ScoreRules("regression", 2): [0, 0]}
    good = PAIR if is_pair else {"text": "a text", "label": labels.get(rules, 0)}
    row = row if is_pair else {"text": "a text"} | row
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2") as error:
        load(good, row, rules=rules)
    assert says in str(error.value)


def test_columns_that_are_missing_everywhere_are_one_problem(load):
    with pytest.raises(ValueError, match="has no column 'label'; it has text"):
        load({"text": "a"}, {"text": "b"}, rules=CLASSES)
    with pytest.raises(ValueError, match="has labels and no text"):
        load({"sentence": "a", "label": 1}, rules=CLASSES)
    with pytest.raises(ValueError, match="has no pairs of answers"):
        load({"text": "a", "label": 1})


def test_texts_end_before_tokens_that_pad(load, tokenizer):
    row = {"chosen": "1 + 1? Two", "rejected": "1 + 1? Three"}
    data = load(row, pad=tokenizer.eos_token_id)
    decoded = [tokenizer.decode(text) for text in data.train[0].texts]
    assert decoded == ["1 + 1? Two", "1 + 1? Three"]
    assert "which also pads rows" in " ".join(data.notices)


def test_rows_that_are_cut_end_before_tokens_that_pad(load, tokenizer):
    end = tokenizer.eos_token
    rows = [{"text": f"abc{end}{end} and more", "label": 0}, {"text": f"a{end * 9}b", "label": 1}]
    cut = {"truncation_strategy": "right", "max_length": 5}
    data = load(*rows, rules=CLASSES, pad=tokenizer.eos_token_id, **cut)
    assert [tokenizer.decode(row.texts[0]) for row in data.train] == ["abc"]
    assert f"1 {EMPTY}" in data.summary()[0]


def test_long_rows(load):
    short, long = PAIR, PAIR | {"chosen": assistant("Two " * 100)}
    data = load(short, long)
    assert [row.row_id for row in data.train] == ["a:1"]
    assert "1 over data.max_length" in data.summary()[0]
    left = load(short, long, truncation_strategy="left")
    assert len(left.train[1].texts[0]) == 200
    assert "1 cut at data.max_length" in left.summary()[0]
    alike = {"chosen": "same " * 100 + "a", "rejected": "same " * 100 + "b"}
    cut = load(short, alike, truncation_strategy="right", max_length=50)
    assert f"1 {SAME}" in cut.summary()[0]
    with pytest.raises(ValueError, match=r"line 2: has .* tokens, more than data\.max_length"):
        load(short, long, truncation_strategy="error")
    with pytest.raises(ValueError, match=r"no row of .* is left"):
        load(long)


def test_columns_that_are_not_read_are_named(load):
    data = load(PAIR | {"score": 3})
    assert any("the column 'score' is not read" in notice for notice in data.notices)


def test_a_template_makes_texts_of_columns(load, tokenizer):
    row = {"title": "A", "body": "b", "label": 1}
    data = load(row, rules=CLASSES, prompt_template="{title}: {body}")
    assert tokenizer.decode(data.train[0].texts[0]) == "A: b"
    assert not any("not read" in notice for notice in data.notices)


def test_the_same_text_is_never_trained_and_held_out(load):
    rows = [{"text": f"text {n % 7}", "label": 0} for n in range(30)]
    data = load(*rows, rules=CLASSES, split_dataset_ratio=0.3)
    seen = {tuple(row.token_ids) for row in data.train}
    assert data.validation
    assert not seen & {tuple(row.token_ids) for row in data.validation}
