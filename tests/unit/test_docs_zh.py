"""The Chinese pages say what the English ones say: equal headings, code, links and numbers."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = [("README.md", "README.zh.md")] + [
    (f"docs/{page.name}", f"docs/zh/{page.name}")
    for page in sorted(REPOSITORY.glob("docs/zh/*.md"))
]
SWITCH = re.compile(r"^(\[English\]\(\S+\) \| 中文|English \| \[中文\]\(\S+\))$", re.MULTILINE)
"""The line that leads to the other language."""


def sections(page):
    """(level of its heading, text below it) for every section."""
    text = SWITCH.sub("", (REPOSITORY / page).read_text("utf-8"))
    levels, texts, in_code = [], [], False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        heading = re.match(r"(#+) ", line)
        if heading and not in_code:
            levels.append(len(heading[1]))
            texts.append("")
        else:
            texts[-1] += line + "\n"
    return list(zip(levels, texts, strict=True))


def code(text):
    """Fenced and indented blocks; comments may be translated."""
    lines, in_code = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            in_code = not in_code
        elif in_code or line.startswith("    "):
            lines.append(re.sub(r"(^|\s+)# .*", "", line).rstrip())
    return lines


def without_code(text):
    return re.sub(r"^(    .*|```[\s\S]*?^```)$", "", text, flags=re.MULTILINE)


def spans(text):
    return sorted(re.findall(r"`([^`\n]+)`", without_code(text)))


def links(text, page):
    """Files of the repository, as seen from its root; a translated page counts as its original."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, mark, anchor = link.partition("#")
        if path and not path.startswith("http"):
            path = str(((REPOSITORY / page).parent / path).resolve().relative_to(REPOSITORY))
        path = dict((zh, en) for en, zh in PAGES).get(path, path)
        found.append(path + mark + (anchor if path else ""))
    return sorted(found)


def numbers(text):
    """Numbers of prose and tables outside names in code."""
    plain = re.sub(r"`[^`\n]+`|\]\([^)\s]+\)", "", without_code(text))
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", plain))


def rows(text):
    return [line.count("|") for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(("english", "chinese"), PAGES)
def test_a_translated_page_has_what_the_english_one_has(english, chinese):
    ours, theirs = sections(english), sections(chinese)
    assert [level for level, _ in ours] == [level for level, _ in theirs]
    for number, ((_, here), (_, there)) in enumerate(zip(ours, theirs, strict=True), 1):
        where = f"section {number} of {chinese}: translate what changed in {english}"
        assert code(there) == code(here), where
        assert spans(there) == spans(here), where
        assert links(there, chinese) == links(here, english), where
        assert numbers(there) == numbers(here), where
        assert rows(there) == rows(here), where


def test_each_language_leads_to_the_other():
    for english, chinese in PAGES:
        assert "[中文](" in (REPOSITORY / english).read_text("utf-8"), english
        assert "[English](" in (REPOSITORY / chinese).read_text("utf-8"), chinese
