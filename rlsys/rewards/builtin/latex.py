r"""One spelling for the many that LaTeX and Unicode have for the same mathematics.

Typography goes: `\$1{,}250` becomes 1250. In a sine, degrees become radians. math-verify reads the
result.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f", r"\,"),
        "\u00d7": r"\times ", "\u00f7": r"\div ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ",
        "\u00b0": r"^\circ ", "\u221e": r"\infty ", "\uff05": r"\%", "\uff0b": "+",
        "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}",
        "\u2153": r"\frac{1}{3}", "\u2154": r"\frac{2}{3}",
        **{power: f"^{digit}" for digit, power in enumerate("\u2070\u00b9\u00b2\u00b3\u2074")},
    }
)  # fmt: skip
_STYLE = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt|normal)|mbox|bm|boldsymbol"
    r"|underline|(?:text)?color\s*\{[^{}]*\})\s*"
)
_STYLED = rf"^\s*{_STYLE}\{{([^{{}}]*)\}}\s*$"
_SPACE = r"(?:(?<!\\)\\[,;:! ]|~|\{,\}|,\\!)"
_END = r"(?![A-Za-z])"
"""Ends a command's name: `\\pounds18` is 18 pounds."""
_TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)\s*(?:\^\s*(?:\d|\{\d\}))?\s*"
_NUMBER = r"-?\d+(?:\.\d+)?"
_DEGREES = r"\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|\\text\{\s*degrees?\s*\})"
_FUNCTIONS = "gcd|lcm|max|min|sin|cos|tan|log|ln|exp|det"
_UNITS = r"mm|cm|dm|km|in|ft|yd|mi|mg|kg|lbs?|oz|m[lL]|hrs?|mins?|secs?"

Replacement = str | Callable[[re.Match[str]], str]

_CURRENCY: tuple[str, Replacement] = (
    r"\\text\s*\{\s*\\\$\s*\}|\\\$|[\u20ac\u00a3\u00a5\u20b9]"
    rf"|\\(?:textdollar|pounds|textsterling|euro|texteuro){_END}",
    "",
)


def _thousands(mark: str) -> tuple[str, Replacement]:
    """Groups of three digits with the same mark between them; math-verify knows the comma."""
    return (
        rf"(?<![\d.,^_])\d{{1,3}}({mark})\d{{3}}(?:\1\d{{3}})*(?!\d)",
        lambda match: re.sub(r"\D", "", match[0]),
    )


_ALWAYS = (_CURRENCY, _thousands(f"{_SPACE}+"))
"""Harmless in prose too."""
_IN_ANSWERS: tuple[tuple[str, Replacement], ...] = (
    _thousands(" "),
    (rf"(?<!\\)\\!|\\(?:displaystyle|bf|rm|it){_END}|\\(?:left|right)\s*(?=[()\[\].|])\.?", ""),
    (rf"(?<!\\)\\(?:q?quad{_END}|[,;: ])|~", " "),
    (r"\u221a\s*(\d+|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}"),
    (
        rf"\\(?:text|mathrm|operatorname)\s*\{{\s*((?i:{_FUNCTIONS}))\s*\}}",
        lambda match: rf"\{match[1].lower()}",
    ),
    (r"\\(?:text|mathrm)\s*\{\s*(?:USD|EUR|GBP|INR|JPY|CNY|Rs\.?)\s*\}|\b(?:USD|EUR|GBP)\b", ""),
    (rf"\\lcm{_END}", r"\\operatorname{lcm}"),
    (r"\\([td]?)binom\s*(\d)\s*(\d)", r"\\binom{\2}{\3}"),
    # 7 \equiv 1 \pmod{3}
    (r"^(.+?)\\equiv(.+?)\\pmod\s*\{?(\w+)\}?\s*$", r"(\1) \\mod \3 = \2"),
    (rf"\\[bp]mod{_END}", r"\\mod "),
    (r"(?<=[\d)])!=", "! ="),
    (
        rf"({_TRIG})(?:\(\s*({_NUMBER}){_DEGREES}\s*\)|\{{\s*({_NUMBER}){_DEGREES}\s*\}}"
        rf"|({_NUMBER}){_DEGREES})",
        lambda match: rf"{match[1]}(\frac{{{match[2] or match[3] or match[4]} \pi}}{{180}})",
    ),
    (_DEGREES, r"^\\circ"),
    (rf"^(\s*[-+]?{_NUMBER})[eE]([-+]?\d+)\s*$", r"\1 \\times 10^{\2}"),
    (rf"(?<=\d)\s*(?:{_UNITS})\.?(?:\s*\^\s*(?:[23]|\{{[23]\}}))?\s*$", ""),
    (_STYLED, lambda match: match[1] if _starts(match[1]) else match[0]),
    (r"^[\s,;]+|(?:\s|\\\\|[.,;])+$", ""),
)


def in_one_spelling(text: str, *, is_answer: bool) -> str:
    """`text` without currency signs and thousands separators.

    Args:
        text: an answer, or a text in which math-verify looks for one.
        is_answer: whether it is an answer, whose LaTeX is made plain too.
    """
    text = text.translate(_UNICODE)
    for pattern, replacement in (*_ALWAYS, *_IN_ANSWERS) if is_answer else _ALWAYS:
        text = re.sub(pattern, replacement, text)
    return text


def without_style(text: str) -> str:
    """`\\text{Evelyn}` as `Evelyn`; an answer with several styles stays."""
    return re.sub(_STYLED, r"\1", in_one_spelling(text, is_answer=True)).strip()


def _starts(text: str) -> bool:
    """Whether a styled text is a number: `\\text{18 dollars}`, not `\\text{Evelyn}`."""
    return re.match(r"\s*[-+]?\.?\d", text) is not None
