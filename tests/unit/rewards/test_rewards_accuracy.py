"""Accuracy: what is right however it is written, and what a model might try instead."""

import math
import subprocess
import threading

import pytest
from data_cases import parsed

from rlsys.rewards import orms
from rlsys.rewards.answers import last_boxed

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def accuracy():
    """One helper process for the module: it imports sympy."""
    return orms["accuracy"]()


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("42", r"\boxed{42}"),
        ("42", "The answer is 42."),
        ("42", "40 + 2 = 42"),
        ("42", "<think>41?</think> <answer>42</answer>"),
        ("42", r"<answer>\boxed{42}</answer>"),
        ("42", "<answer>42</answer> again <answer>42</answer>"),
        ("42", "<answer> 42 apples </answer>"),
        ("42", r"\boxed{41}, no: \boxed{42}"),
        ("42", r"\boxed{\boxed{42}}"),
        ("42", r"\boxed{42.0}"),
        ("42", r"\boxed{x = 42}"),
        ("42", r"\boxed{f(2) = 42}"),
        ("42", r"\boxed{40 + 2 = 42}"),
        (42, r"\boxed{42}"),
        (0.5, r"\boxed{\frac{1}{2}}"),
        ("-5", r"\boxed{−5}"),  # noqa: RUF001  a minus sign, not a hyphen
        ("1,234", r"\boxed{1234}"),
        ("1/2", r"\boxed{\frac12}"),
        (r"\frac{1}{3}", r"\boxed{\dfrac{2}{6}}"),
        (r"$\frac12$", "<answer>0.5</answer>"),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
        ("x^2+1", r"\boxed{1 + x^2}"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}"),
        (r"[0,1)", r"\boxed{[0,1)}"),
        (r"\infty", r"\boxed{\infty}"),
        (r"\$18", "She makes $18 every day."),
        ("3 * 24 = <<3*24=72>>72\n#### 72", r"\boxed{72}"),
        ("#### $1,080", r"\boxed{1080}"),
        (r"Thus \boxed{7}.", r"\boxed{7}"),
        (1e-07, r"\boxed{10^{-7}}"),
    ],
)
def test_right_answers_score_1(accuracy, gold, completion):
    assert accuracy([completion], solution=[gold]) == [1.0]


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("42", ""),
        ("42", r"\boxed{}"),
        ("42", r"\boxed{41}"),
        ("42", r"\boxed{42}, no: \boxed{41}"),
        ("42", "<answer>42</answer><answer>41</answer>"),
        ("42", "<answer>41</answer><answer>42</answer>"),
        ("42", "<answer>42"),
        ("42", "42</answer>"),
        ("42", "<answer><answer>42</answer></answer>"),
        ("42", "<think>so 42"),
        ("42", "<think>42</think>"),
        ("42", "<think>42</think> <answer>41</answer>"),
        ("42", r"\boxed{41, 42}"),
        ("42", r"\boxed{41 \text{ or } 42}"),
        ("42", r"\boxed{\{41, 42\}}"),
        ("42", r"\boxed{41 < x < 43}"),
        ("42", r"\boxed{41 = 42}"),
        ("42", r"\boxed{1 = 2 = 42}"),
        ("42", r"\boxed{42 = 41}"),
        ("42", r"\boxed{42 x}"),
        ("42", r"\boxed{٤٢}"),
        ("-5", r"\boxed{5}"),
        (r"2\sqrt{3}", r"\boxed{2}"),
        ("1/3", r"\boxed{0.33}"),
        ("(1,2)", r"\boxed{(2,1)}"),
    ],
)
def test_wrong_answers_score_0(accuracy, gold, completion):
    assert accuracy([completion], solution=[gold]) == [0.0]


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{" * 20_000,
        "}" * 20_000,
        r"\boxed{" + "1" * 100_000 + "}",
        "(" * 1_500 + "1" + ")" * 1_500,
        "<answer>" * 20_000,
        r"\boxed{" + r"\frac{" * 300 + "}",
        "\x00\ud800 \\boxed{1\x00}",
    ],
    ids=lambda text: text[:8].encode("unicode_escape").decode(),
)
def test_huge_or_broken_answers_score_0(accuracy, completion):
    assert accuracy([completion], solution=["42"]) == [0.0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\infty", r"\infty = \infty"),
        ("3", r"\frac{0}{0}=3"),
        ("4", r"\frac10-\frac10=4"),
        ("4", r"\infty = 4"),
        ("1", r"\infty - \infty = 1 = 1"),
    ],
)
def test_an_equation_of_infinities_scores_0(accuracy, gold, answer):
    assert accuracy([rf"\boxed{{{answer}}}"], solution=[gold]) == [0.0]


def test_an_answer_at_which_the_comparison_fails_is_wrong(monkeypatch):
    from rlsys.rewards.builtin import math_check

    def fail(*args, **kwargs):
        raise TypeError("Invalid NaN comparison")

    monkeypatch.setattr(math_check, "verify", fail)
    assert math_check.check("3", "3.0", True) is False


def test_an_endless_comparison_is_stopped_and_the_next_answer_is_right():
    accuracy = orms["accuracy"](time_limit_s=1.5)
    endless = r"\boxed{\int_0^1 \frac{x^{17} \sin(x^5)}{\ln(x+3)^7 + \cos(x^x)} dx = 99999999!}"
    assert accuracy([endless, r"\boxed{3}"], solution=["3"] * 2) == [0.0, 1.0]


def test_it_works_in_a_thread_where_signals_do_not(accuracy):
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(accuracy([r"\boxed{1}"], solution=[1])))
    thread.start()
    thread.join()
    assert scores == [1.0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", r"\$18"),
        ("1250.5", r"\$1,250.50"),
        ("-18", r"-\$18"),
        ("3/4", r"\dfrac{\$3}{4}"),
        ("18", r"\text{\$}18"),
        ("18", "€18"),
        ("18", r"\pounds18"),
        ("18", r"\displaystyle18"),
        (r"\text{Evelyn}", "Evelyn"),
        ("$1,000", "£1,000"),
        ("18", r"\text{18 dollars}"),
        ("18", "18."),
        ("1234567", r"1\,234\,567"),
        ("1234567", "1{,}234{,}567"),
        ("1234", r"1,\!234"),
        ("10000", r"10\,000"),
        ("1000000", "1 000 000"),
        ("0.5", r"50\%"),
        ("45", r"45^\circ"),
        ("45", "45°"),
        ("-5", "–5"),  # noqa: RUF001  an en dash
        ("0.5", "½"),
        (r"\sqrt{3}", "√3"),
        ("x^2", "x²"),
        ("6", r"6~\text{m}^{3}"),
        ("6", "6 cm^2"),
        ("1500", "1.5e3"),
        ("7", r"\boldsymbol{7}"),
        ("10", r"\binom52"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
)
def test_typography_changes_no_verdict(accuracy, gold, answer):
    completions = [rf"\boxed{{{answer}}}", f"<answer>{answer}</answer>", r"\boxed{99}"]
    assert accuracy(completions, answer=[gold] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("12", r"1\,2"), ("18", r"-\$18"), ("1234", "1,2,3,4"), ("12345", "123 45")],
)
def test_answers_that_only_look_like_typography_score_0(accuracy, gold, answer):
    assert accuracy([rf"\boxed{{{answer}}}"], answer=[gold]) == [0.0]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\gcd(12, 18)", "6"),
        (r"\operatorname{lcm}(4,6)", "12"),
        (r"\mathrm{lcm}(4,6)", "12"),
        (r"50\%", "0.5"),
        (r"\lim_{x \to 0} \frac{\sin x}{x}", "1"),
        (r"\lim_{x\to\infty} x", r"\infty"),
        (r"\sin 30^\circ", r"\frac{1}{2}"),
        (r"\sin^2 30^{\circ} + \cos^2 30^{\circ}", "1"),
        (r"\tan(45°)", "1"),
        (r"\cos\left(60^\circ\right)", r"\frac12"),
        (r"\text{GCD}(12,18)", "6"),
        (r"\arcsin \frac12", r"30^\circ"),
        (r"\sum_{i=1}^{10} i", "55"),
        (r"\int_0^1 x\,dx", r"\frac12"),
        (r"\prod_{i=1}^{4} i", "24"),
        ("5!", "120"),
        (r"\lfloor 3.7 \rfloor", "3"),
        (r"10 \bmod 7", "3"),
        (r"\log_2 8", "3"),
    ],
)
def test_an_equation_is_judged_by_its_value(accuracy, left, right):
    boxed = [rf"\boxed{{{left} = {right}}}", rf"\boxed{{{left}={right}}}"]
    assert accuracy(boxed, answer=[right] * 2) == [1.0] * 2
    assert accuracy([rf"\boxed{{{left} = 7}}"], answer=["7"]) == [0.0]  # it is false
    if "arcsin" not in left:  # of which the value is in radians
        assert accuracy([rf"\boxed{{{left}}}"], answer=[right]) == [1.0]


@pytest.mark.parametrize("left", ["P(X>2)", r"n(A \cup B)", r"\max\{1,2\}", r"{}_5C_2"])
def test_of_an_equation_that_cannot_be_read_the_right_side_counts(accuracy, left):
    texts = [rf"\boxed{{{left} = 0.3}}", rf"\boxed{{{left} = 0.4}}"]
    texts.append(rf"\boxed{{41, {left} = 0.3}}")
    assert accuracy(texts, answer=["0.3"] * 3) == [1.0, 0.0, 0.0]


def test_numbers_below_each_other_are_not_one(accuracy):
    assert accuracy(["First 12\n345", "it is 12\u202f345"], answer=["345", "12345"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("So \\boxed{7}.", "7"),
        ("7", "7"),
        ("<think>Maybe 5.</think>\n\n7", "7"),
        ("See Figure 4. It is seven.", None),
    ],
)
def test_the_last_turn_of_the_assistant_is_an_answer_only_where_it_marks_one(accuracy, said, gold):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    columns = parsed({"messages": turns}).columns
    assert accuracy.gold(columns) == gold
    assert accuracy.gold(columns | {"answer": "9"}) == "9"


PROSE = "See Figure 4. The slope is minus two."


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"solution": PROSE, "answer": "-2"}, "-2", "4"),
        ({"solution": rf"{PROSE} \boxed{{5}}", "answer": "-2"}, "-2", "5"),
        ({"solution": rf"{PROSE} \boxed{{-2}}", "answer": PROSE}, "-2", "4"),
        ({"solution": rf"{PROSE} \boxed{{-2}}", "answer": None}, "-2", "4"),
        ({"solution": rf"{PROSE} \boxed{{-2}}", "answer": " "}, "-2", "4"),
        ({"solution": rf"{PROSE} \boxed{{-2}}", "answer": math.nan}, "-2", "nan"),
        ({"solution": f"{PROSE}\n#### -2"}, "-2", "4"),
        ({"solution": "#### 1. Step 4\n#### Result\nSo \\boxed{-2}"}, "-2", "4"),
        ({"solution": rf"<think>\boxed{{4}}?</think> {PROSE} \boxed{{-2}}"}, "-2", "4"),
        ({"answer": f"{PROSE} <answer>-2</answer>"}, "-2", "4"),
        ({"solution": "-2"}, "-2", "4"),
    ],
)
def test_a_final_answer_goes_before_a_derivation(accuracy, row, right, wrong):
    columns = {column: [value] * 2 for column, value in row.items()}
    completions = [rf"\boxed{{{right}}}", rf"\boxed{{{wrong}}}"]
    rewards = [accuracy]
    if row.get("answer") != PROSE:  # sentences may be what a text has to equal
        rewards.append(orms["exact_match"]())
    for reward in rewards:
        assert reward(completions, **columns) == [1.0, 0.0]
        assert reward.gold(row) == right


@pytest.mark.parametrize(
    "prose", [PROSE, "We add 2 and 3, which makes 5 in all.", "因此答案是4。", "So it is 5."]
)
def test_prose_is_not_an_answer(accuracy, prose):
    for reward in (accuracy, orms["exact_match"](), orms["multiple_choice"]()):
        assert reward([r"\boxed{4}", r"\boxed{5}"], solution=[prose] * 2) == [None, None]
        assert reward.gold({"solution": prose}) is None


def test_reading_a_right_answer_is_linear_in_its_length(accuracy):
    assert accuracy.gold({"solution": PROSE + "\\(" * 200_000}) is None  # squared: minutes


@pytest.mark.parametrize("text", ["See Figure 4", "The answer is 4", "we add 2 and 3 to get 5"])
def test_a_number_among_words_is_not_mathematics(accuracy, text):
    assert accuracy(["4", "5"], answer=[text] * 2) == [None, None]


@pytest.mark.parametrize("gold", ["no idea", "???"])
def test_a_row_that_cannot_be_read_does_not_apply_and_is_logged_once(
    accuracy, gold, caplog, monkeypatch
):
    monkeypatch.setattr("rlsys.rewards.answers._warned", set())
    for _ in range(2):
        assert accuracy(["<answer>1</answer>"] * 2, solution=[gold] * 2) == [None, None]
    assert [gold in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "gold", ["", "   ", "####", "so #### ", "$$", r"\boxed{}", "<answer></answer>"]
)
def test_an_empty_right_answer_is_an_error(accuracy, gold):
    with pytest.raises(ValueError, match="right answer of a row must not be empty, found"):
        accuracy([r"\boxed{1}"], solution=[gold])


def test_nan_is_not_a_right_answer(accuracy):
    for reward in (accuracy, orms["exact_match"]()):
        with pytest.raises(ValueError, match="found nan"):
            reward(["nan"], answer=[math.nan])


def test_only_the_place_that_was_asked_for_counts(accuracy):
    texts = ["42", "<answer>42</answer>", r"\boxed{42}"]
    for where, expected in (
        ("any", [1.0, 1.0, 1.0]),
        ("tags", [0.0, 1.0, 0.0]),
        ("boxed", [0.0, 0.0, 1.0]),
    ):
        reward = accuracy if where == "any" else orms["accuracy"](answer_format=where)
        assert reward(texts, answer=["42"] * 3) == expected
    with pytest.raises(ValueError, match="must be one of any, tags, boxed"):
        orms["accuracy"](answer_format="box")


def test_a_dataset_without_answers_is_an_error(accuracy):
    with pytest.raises(ValueError, match="needs a dataset column 'answer' or 'solution'"):
        accuracy(["1"])
    with pytest.raises(ValueError, match="must be text or a number, found None"):
        accuracy(["1"], solution=[None])


def test_the_helper_process_ends_with_the_reward():
    accuracy = orms["accuracy"]()
    assert accuracy(["1"], solution=["1"]) == [1.0]
    pid = accuracy._check._process.pid
    del accuracy
    assert subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed {a\}b}", r"a\}b"),
        (r"\boxed{\frac{1}{2}} and {}", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed 42.", "42"),
        (r"$\boxed -3,000$", "-3,000"),
        (r"\boxed is where it goes", None),
        (r"\fbox{42}", "42"),
        (r"\framebox{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{41}, no: \fbox{42}", "42"),
        (r"\\boxed{8}", "8"),
        ("", None),
    ],
)
def test_the_last_box_that_closes(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    "attack",
    [
        "open('{file}', 'w')",
        "__import__('pathlib').Path('{file}').touch()",
        r"\boxed{{open('{file}', 'w')}}",
        r"\boxed{{\mathrm{{exec}}(\text{{open('{file}', 'w')}})}}",
        "the answer is 1+open('{file}','w').fileno()",
        "<answer>(lambda: open('{file}', 'w'))()</answer>",
        "1 + 1 (open('{file}', 'w')) + 2",
    ],
)
def test_answers_are_read_and_never_run(accuracy, tmp_path, attack):
    """sympy's reader of expressions calls eval: math-verify gives it digits and operators only."""
    file = tmp_path / "ran"
    text = attack.format(file=file)
    assert accuracy([text, text], solution=["2", text]) is not None
    assert not file.exists()
    assert accuracy([r"\boxed{2}"], solution=["2"]) == [1.0]
